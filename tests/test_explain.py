"""The command explain: a figure of what two networks look at."""

import pandas as pd
import pytest
from PIL import Image

from medmask import cli
from medmask.saliency import panels
from medmask.saliency.looks import choose_rows
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


def test_images_are_taken_in_turn():
    rows = pd.DataFrame({"label": [0] * 50 + [1] * 10, "has_cue": ([0] * 49 + [1]) + [0] * 10})
    chosen = choose_rows(rows, 5, 0)
    assert chosen[["label", "has_cue"]].values.tolist() == [[0, 0], [0, 1], [1, 0], [0, 0], [1, 0]]
    assert choose_rows(rows, 5, 0).equals(chosen)
