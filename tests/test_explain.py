"""The command explain: a figure of what two networks look at."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from medmask import cli
from medmask.config.finetuning import MaskRule
from medmask.saliency import looks, panels
from medmask.saliency.looks import choose_rows
from medmask.saliency.masks import Masks
from tests.toy import train_masked, write_data


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The results of a pretraining, its maps, and a finetuning on masked images."""
    folder = tmp_path_factory.mktemp("explain")
    train_masked(folder / "results", write_data(folder / "data"), {"masked": {"kind": "top_k", "strength": 0.3}})
    return folder / "results"


def drawn(monkeypatch):
    calls = []
    real = panels.draw_panels
    monkeypatch.setattr(panels, "draw_panels", lambda *args: calls.append(args) or real(*args))
    return calls


def test_five_panels(runs, monkeypatch):
    calls = drawn(monkeypatch)
    assert cli.main(["explain", str(runs / "finetune/masked"), "-n", "4"]) == 0
    images, before, after, masks, texts = calls[0]
    assert images.shape == (4, 1, 28, 28)
    assert before.shape == after.shape == (4, 28, 28)
    assert masks.shape == (4, 1, 28, 28)
    assert 0 < float((masks == 0).float().mean()) < 0.5
    assert [text[0] for text in texts] == ["c0", "c1", "c0", "c1"]
    assert Image.open(runs / "finetune/masked/explain.png").size[0] > 5 * 150


def test_maps_are_made_as_those_of_the_masks_were(runs, monkeypatch, tmp_path):
    made = runs / "mask/maps/config.json"
    before = made.read_text()
    asked = []
    monkeypatch.setattr(looks, "compare", lambda *args, **_: asked.append(args[4]) or [None] * 5)
    monkeypatch.setattr(panels, "draw_panels", lambda *args: Figure())
    changed = json.loads(before)
    changed["config"] |= {"layer": "backbone.9", "target": "predicted", "epsilon": 1e-7}
    made.write_text(json.dumps(changed))
    try:
        for more in ([], ["--layer", "backbone.6"]):
            assert cli.main(["explain", str(runs / "finetune/masked"), "--out", str(tmp_path / "x.png"), *more]) == 0
    finally:
        made.write_text(before)
    assert [(cfg.layer, cfg.target, cfg.epsilon) for cfg in asked] == [
        ("backbone.9", "predicted", 1e-7), ("backbone.6", "predicted", 1e-7),
    ]  # fmt: skip


def test_without_masks_and_against_another_run(runs, monkeypatch, tmp_path):
    calls = drawn(monkeypatch)
    out = tmp_path / "x.png"
    other = ["--against", str(runs / "finetune/masked"), "--side", "val", "--out", str(out)]
    assert cli.main(["explain", str(runs / "pretrain/erm"), *other]) == 0
    assert calls[0][3] is None
    assert out.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gone"], "need the folder of a training with its config.json"),
        (["mask/maps"], "need a pretraining or finetuning that has read data, got mask"),
        (["pretrain/erm"], "--against: "),
        (["finetune/masked", "--layer", "backbone.77"], "no layer 'backbone.77' whose output is a map"),
        (["finetune/masked", "--side", "test"], "no images on the side test"),
    ],
)
def test_mistakes_are_one_line(runs, capsys, argv, message):
    assert cli.main(["explain", str(runs / argv[0]), *argv[1:]]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line


def test_a_network_of_other_classes_is_refused(runs, tmp_path, capsys):
    other = tmp_path / "results"
    train_masked(other, write_data(tmp_path / "data", n_classes=3), {})
    assert cli.main(["explain", str(runs / "finetune/masked"), "--against", str(other / "pretrain/erm")]) == 2
    assert "has 3 classes, the data have 2" in capsys.readouterr().err


def test_images_are_taken_in_turn():
    rows = pd.DataFrame({"label": [0] * 50 + [1] * 10, "has_cue": ([0] * 49 + [1]) + [0] * 10})
    chosen = choose_rows(rows, 5, 0)
    assert chosen[["label", "has_cue"]].values.tolist() == [[0, 0], [0, 1], [1, 0], [0, 0], [1, 0]]
    assert choose_rows(rows, 5, 0).equals(chosen)


def write_masks(runs, folder, *more, run="finetune/masked"):
    return cli.main(["explain", str(runs / run), "--masks", str(folder), *more])


def test_masks_are_written_as_the_training_has_used_them(runs, tmp_path):
    """White keeps, black hides; the index names each file and what it hides."""
    out = tmp_path / "masks"
    out.mkdir()  # an empty one may be there
    assert write_masks(runs, out) == 0
    index = pd.read_csv(out / "masks.csv")
    assert len(index) == 48 - 14  # all training images, none for validation
    assert set(index["side"]) == {"train"}
    assert len(list(out.rglob("*.png"))) == 2 * len(index)
    assert not list(tmp_path.glob(".part*"))
    positions = index["position"].to_numpy()
    rule = MaskRule(kind="top_k", strength=0.3)
    expected = Masks(runs / "mask/maps/maps.safetensors", rule, positions, 0)(positions, 28, 28)[:, 0].numpy()
    pixels = np.load(runs.parent / "data/images.npy").reshape(-1, 28, 28)[positions]
    for i, row in index.iterrows():
        mask = np.array(Image.open(out / row["mask"]))
        assert (mask == 255 * expected[i]).all()
        assert (np.array(Image.open(out / row["masked"])) == np.where(mask, pixels[i], 0)).all()
        assert row["hidden"] == pytest.approx((mask == 0).mean(), abs=1e-5)
    assert 0 < index["hidden"].mean() < 0.5


def test_some_masks_in_turn_from_each_class(runs, tmp_path, capsys):
    assert write_masks(runs, tmp_path / "m", "-n", "3") == 0
    index = pd.read_csv(tmp_path / "m/masks.csv")
    assert index["class_name"].tolist() == ["c0", "c1", "c0"]
    assert "masks: 3 of 3 images" in capsys.readouterr().err


def test_soft_masks_are_grey(runs, tmp_path):
    """And are what the pixels are multiplied by."""
    folder = tmp_path / "soft"
    shutil.copytree(runs / "finetune/masked", folder)
    record = json.loads((folder / "config.json").read_text())
    record["config"]["mask_rule"]["edges"] = "soft"
    (folder / "config.json").write_text(json.dumps(record))
    assert cli.main(["explain", str(folder), "--masks", str(tmp_path / "m"), "-n", "1"]) == 0
    (row,) = pd.read_csv(tmp_path / "m/masks.csv").itertuples()
    mask, masked = (np.array(Image.open(tmp_path / "m" / name)).astype(float) for name in (row.mask, row.masked))
    assert len(np.unique(mask)) > 2
    pixels = np.load(runs.parent / "data/images.npy").reshape(-1, 28, 28)[row.position]
    assert masked == pytest.approx(pixels * mask / 255, abs=1)


@pytest.mark.parametrize(
    ("run", "more", "message"),
    [
        ("pretrain/erm", [], "was trained on whole images: its settings have no mask_rule"),
        ("finetune/masked", ["--side", "val"], "--side: not together with --masks"),
        ("finetune/masked", ["--out", "x.png"], "--out: not together with --masks"),
        ("mask/maps", [], "need a pretraining or finetuning that has read data, got mask"),
    ],
)
def test_masks_that_cannot_be_written(runs, tmp_path, capsys, run, more, message):
    assert write_masks(runs, tmp_path / "m", *more, run=run) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_a_folder_with_something_in_it_is_left_alone(runs, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert write_masks(runs, tmp_path) == 2
    assert write_masks(runs, tmp_path / "notes.txt") == 2
    assert capsys.readouterr().err.count("is there and not empty; name a new folder") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("n", ["0", "-3", "many"])
def test_a_number_of_images_that_is_none(runs, n):
    with pytest.raises(SystemExit) as stop:
        cli.main(["explain", str(runs / "finetune/masked"), f"-n={n}"])
    assert stop.value.code == 2


def test_a_figure_of_all_images_is_refused(runs, capsys):
    assert cli.main(["explain", str(runs / "finetune/masked"), "-n", "all"]) == 2
    assert "-n: all is for --masks" in capsys.readouterr().err
