"""Stage noise, from the command line."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medmask import cli

SIDES = {"train": 50, "val": 21, "test": 30, "meta_set": 9}
SUMMARY = {"classes": ["a", "b", "c", "none"], "sides": {side: {"n": n} for side, n in SIDES.items()}}


@pytest.fixture
def run(tmp_path):
    sides = np.repeat(list(SIDES), list(SIDES.values()))
    table = pd.DataFrame(
        {"image_id": [f"i{n}" for n in range(len(sides))], "label": np.arange(len(sides)) % 3, "side": sides}
    )
    table.to_csv(tmp_path / "split.csv", index=False)
    (tmp_path / "split.json").write_text(json.dumps(SUMMARY))

    def run(out="out", **config):
        files = {"split": "split.csv", "summary": "split.json", "labels": f"{out}/labels.csv",
                 "transition": f"{out}/transition.json", "figure": f"{out}/noise.png"}  # fmt: skip
        flags = [text for flag, name in files.items() for text in (f"--{flag}", str(tmp_path / name))]
        if code := cli.main(["noise", "--config", json.dumps(config), *flags]):
            return code
        labels = pd.read_csv(tmp_path / out / "labels.csv")
        assert labels["image_id"].tolist() == table["image_id"].tolist()
        assert labels["true_label"].tolist() == table["label"].tolist()
        assert (labels["is_flipped"] == (labels["true_label"] != labels["noisy_label"])).all()
        return labels.assign(side=sides), json.loads((tmp_path / out / "transition.json").read_text())

    return run


def test_exact_counts_and_untouched_sides(run, tmp_path):
    labels, transition = run(kind="symmetric", rate=0.4)
    assert labels.groupby("side")["is_flipped"].sum().to_dict() == {"train": 20, "val": 8, "test": 0, "meta_set": 0}
    assert labels["noisy_label"].max() == 2  # the class without images is no target
    train = labels[labels["side"] == "train"]
    counts = pd.crosstab(train["true_label"], train["noisy_label"]).to_numpy()
    facts = transition["train"]
    assert (facts["n"], facts["flipped"], facts["rate"]) == (50, 20, 0.4)
    assert np.array(facts["counts"])[:3, :3].tolist() == counts.tolist()
    assert np.allclose(np.array(facts["matrix"][:3])[:, :3], counts / counts.sum(axis=1, keepdims=True))
    assert facts["matrix"][3] is None
    assert transition["val"]["flipped"] == 8
    assert transition["classes"] == ["a", "b", "c", "none"]
    assert min(Image.open(tmp_path / "out/noise.png").size) > 400
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "labels.csv",
        "transition.json",
        "noise.png",
        "config.json",
    }


def test_as_published(run):
    labels, transition = run(kind="symmetric", rate=1.0, mode="as_published")
    assert labels.groupby("side")["is_flipped"].sum().to_dict() == {"train": 50, "val": 0, "test": 0, "meta_set": 0}
    assert np.array(transition["train"]["counts"])[:, 3].sum() > 5  # a class without images is a target


def test_seeds(run):
    first, second, other = (
        run(out, kind="symmetric", rate=0.3, seed=seed)[0] for out, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first["noisy_label"].tolist() == second["noisy_label"].tolist() != other["noisy_label"].tolist()


def test_none(run):
    labels, transition = run(kind="none")
    assert labels["is_flipped"].sum() == 0
    assert transition["train"]["matrix"][:3] == np.eye(4)[:3].tolist()


def test_single_class(run, tmp_path, capsys):
    (tmp_path / "split.csv").write_text("image_id,label,side\ni0,0,train\n")
    (tmp_path / "split.json").write_text(json.dumps({"classes": ["a", "b"], "sides": {"train": {"n": 1}}}))
    assert run(kind="symmetric", rate=0.4) == 2
    assert "has a single class" in capsys.readouterr().err
    assert run(kind="symmetric", rate=1.5) == 2
    assert "rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "".join(text.splitlines(keepends=True)[:-3]), "6 rows on the side meta_set, but "),
        (lambda text: text[:-2], "split.csv: cut: its last line has no end"),
        (lambda text: text.replace("i3,0,", "i3,4,"), "split.csv: 1 problem:\n  image i3: label is not in 0..3"),
        (lambda text: text.replace("i3,0,", "i2,0,"), "split.csv: 1 problem:\n  image i2: stands twice"),
    ],
)
def test_damaged_splits(run, tmp_path, capsys, change, message):
    (tmp_path / "split.csv").write_text(change((tmp_path / "split.csv").read_text()))
    assert run(kind="none") == 2
    assert message in capsys.readouterr().err
    assert not any((tmp_path / "out").iterdir())
