import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from medmask.cli import main
from medmask.config.training import Image
from tests.toy import write_pack

CLASSES = ["cat", "dog", "emu"]


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def short(name: str) -> int:
    return int.from_bytes(bytes.fromhex(digest(name)[:16]), "big", signed=True)


def split_row(position: int, side: str, label: int, test_set: str = "", sha: str | None = None) -> dict:
    name = f"i{position}"
    return {
        "image_id": name, "position": position, "label": label, "class_name": CLASSES[label], "group": f"g{position}",
        "sha256": sha or digest(name), "side": side, "test_set": test_set,
    }  # fmt: skip


class FakeNetwork(torch.nn.Module):
    """Logits that point at the value of the image's first pixel, shifted by `shift` classes."""

    def __init__(self, shift: int = 0, factor: float = 1.0):
        super().__init__()
        self.shift, self.factor = shift, factor

    def forward(self, images):
        target = (images[:, 0, 0, 0].long() + self.shift) % len(CLASSES)
        return torch.nn.functional.one_hot(target, len(CLASSES)).float() * 3 * self.factor


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Files of a split, and a stand-in for networks and images; images show their label."""
    rows = [split_row(i, "train", i % 3) for i in range(6)]
    rows += [split_row(6 + i, "test", i % 3, "raw") for i in range(5)]
    rows += [split_row(11 + i, "test", i % 2, "cue") for i in range(4)]
    made = list(rows)
    calls: list[np.ndarray] = []
    models = {
        name: [FakeNetwork(), SimpleNamespace(classes=CLASSES, n_classes=3, image={"size": 8}, epoch=epoch), []]
        for name, epoch in (("model", 3), ("best", 3))
    }
    state = SimpleNamespace(rows=rows, made=made, models=models, calls=calls, classes=CLASSES)

    def eval_batches(images, index, positions, image, batch_size):
        assert isinstance(image, Image)
        calls.append(positions)
        labels = {row["position"]: row["label"] for row in state.rows}
        shown = torch.tensor([labels[int(position)] for position in positions]).float()
        yield from shown.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).split(4)

    def load_classifier(path):
        network, spec, seen = models[path.stem]
        return network, spec, np.array(seen, dtype=np.int64)

    monkeypatch.setattr("medmask.data.images.eval_batches", eval_batches)
    monkeypatch.setattr("medmask.models.weights.load_classifier", load_classifier)
    monkeypatch.setattr("medmask.evaluation.predict.pick_device", lambda needs: torch.device("cpu"))

    def evaluate(**settings) -> int:
        pd.DataFrame(state.rows).to_csv(tmp_path / "split.csv", index=False)
        counts = pd.Series([row["side"] for row in state.made]).value_counts()  # as they were when the split was made
        facts = {"classes": state.classes, "sides": {side: {"n": int(n)} for side, n in counts.items()}}
        (tmp_path / "split.json").write_text(json.dumps(facts))
        write_pack(tmp_path, [np.zeros((1, 1, 1), np.uint8)] * 15)
        files = {"images": "images.npy", "index": "index.npy"}
        files |= {"model": "model.safetensors", "best": "best.safetensors"}
        for name in ("model", "best"):
            (tmp_path / files[name]).touch()
        files |= {"split": "split.csv", "summary": "split.json", "predictions": "out/predictions.csv"}
        files |= {"predictions-best": "out/predictions_best.csv", "metrics": "out/metrics.json"}
        given = [text for name, file in files.items() for text in (f"--{name}", str(tmp_path / file))]
        return main(["evaluate", "--config", json.dumps({"draws": 100, **settings}), *given])

    state.evaluate, state.out = evaluate, tmp_path / "out"
    return state


def test_files_and_numbers(stage):
    stage.models["best"][:2] = [FakeNetwork(shift=1), SimpleNamespace(**{**vars(stage.models["best"][1]), "epoch": 2})]
    assert stage.evaluate() == 0
    assert {path.name for path in stage.out.iterdir()} == {
        "predictions.csv", "predictions_best.csv", "metrics.json", "config.json",
    }  # fmt: skip
    table = pd.read_csv(stage.out / "predictions.csv")
    assert list(table) == [
        "test_set", "image_id", "group", "label", "predicted", "prob_cat", "prob_dog", "prob_emu",
    ]  # fmt: skip
    assert table["image_id"].tolist() == [f"i{i}" for i in range(6, 15)]
    assert (table["predicted"] == table["label"]).all()
    assert table.filter(like="prob_").sum(axis=1).to_numpy() == pytest.approx(1)
    metrics = json.loads((stage.out / "metrics.json").read_text())
    assert metrics["epochs"] == {"last": 3, "best": 2}
    assert set(metrics["last"]) == {"raw", "cue"}
    assert metrics["last"]["raw"]["metrics"]["accuracy"]["value"] == 1
    assert metrics["best"]["raw"]["metrics"]["accuracy"]["value"] == 0
    assert metrics["last"]["cue"]["absent"] == ["emu"]
    assert metrics["constants"]["raw"]["majority"]["accuracy"] == pytest.approx(2 / 5)
    assert metrics["notes"] == []


def test_the_same_epoch_is_predicted_once(stage):
    assert stage.evaluate() == 0
    assert len(stage.calls) == 1
    assert stage.calls[0].tolist() == list(range(6, 15))
    assert (stage.out / "predictions.csv").read_bytes() == (stage.out / "predictions_best.csv").read_bytes()


def test_only_the_test_sets_asked_for(stage, capsys):
    assert stage.evaluate(test_sets=["cue"]) == 0
    assert set(json.loads((stage.out / "metrics.json").read_text())["last"]) == {"cue"}
    assert stage.evaluate(test_sets=["queue"]) == 2
    assert "evaluate.test_sets: unknown test set 'queue'; " in capsys.readouterr().err


def test_test_images_that_were_trained_on_are_refused(stage, capsys):
    stage.models["model"][2] = [short("i0"), short("i7"), short("i8")]
    assert stage.evaluate() == 2
    error = capsys.readouterr().err
    assert "model.safetensors: trained on 2 of 9 test images" in error
    assert "first: i7, i8" in error
    assert not list(stage.out.iterdir())
    assert stage.evaluate(leak="count") == 0
    notes = json.loads((stage.out / "metrics.json").read_text())["notes"]
    assert notes == [
        "2 of 9 test images were among the images that the weights, or those they started from, were trained on"
    ]


def test_the_best_epoch_is_checked_too(stage):
    stage.models["best"][2] = [short("i7")]
    assert stage.evaluate() == 2


def test_overlap_inside_the_split_is_counted_and_no_leak(stage):
    stage.rows[0]["sha256"] = digest("i7")  # a training image with the pixels of a test image
    stage.models["model"][2] = stage.models["best"][2] = [short(f"i{i}") for i in range(1, 6)] + [short("i7")]
    assert stage.evaluate() == 0
    notes = json.loads((stage.out / "metrics.json").read_text())["notes"]
    assert notes == ["1 of 9 test images are pixel-identical to training images of this split"]


def test_classes_must_agree(stage, capsys):
    stage.classes = ["dog", "cat", "emu"]
    assert stage.evaluate() == 2
    assert "trained for the classes cat, dog, emu, but" in capsys.readouterr().err


def test_a_diverged_network_is_refused(stage, capsys):
    stage.models["model"][0] = FakeNetwork(factor=float("nan"))
    assert stage.evaluate() == 2
    assert "no finite probabilities for 9 of 9 test images" in capsys.readouterr().err


def test_a_split_without_test_images_is_refused(stage, capsys):
    stage.rows[:] = stage.made[:] = stage.rows[:6]
    assert stage.evaluate() == 2
    assert "need images on the side test, got none" in capsys.readouterr().err


def test_a_cue_gives_the_worst_group(stage):
    for row in stage.rows:
        row["has_cue"] = int(row["position"] % 4 == 0)
    assert stage.evaluate() == 0
    metrics = json.loads((stage.out / "metrics.json").read_text())
    assert metrics["last"]["raw"]["metrics"]["worst_group_accuracy"]["value"] == 1
    assert "has_cue" in pd.read_csv(stage.out / "predictions.csv")


def test_a_cut_or_foreign_split_is_refused(stage, capsys):
    stage.rows.pop()
    assert stage.evaluate() == 2
    assert "split.csv: 8 rows on the side test, but " in capsys.readouterr().err
    stage.rows.append(stage.made[-1] | {"position": 15})
    assert stage.evaluate() == 2
    assert "split.csv: 1 problem:\n  image i14: position is not in 0..14" in capsys.readouterr().err
