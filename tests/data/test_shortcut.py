"""Cues: their pixels, who carries them, and the test sets they make."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydantic import ValidationError

from medmask import cli
from medmask.config.data import Shortcut
from medmask.data.pack import Pack
from medmask.data.shortcut import cue_area, draw_carriers, draw_cue, place_cues, with_all_rates
from medmask.errors import ConfigError

RATE = {"a": 0.9, "b": 0.1}


def frame(n: int = 200, n_test: int = 40) -> pd.DataFrame:
    names = np.array(["a", "b"])[np.arange(n) % 2]
    side = np.where(np.arange(n) < n - n_test, np.where(np.arange(n) % 10 == 9, "val", "train"), "test")
    return pd.DataFrame({
        "image_id": [f"i{k}" for k in range(n)], "position": np.arange(n), "label": np.arange(n) % 2,
        "class_name": names, "group": [f"g{k}" for k in range(n)], "sha256": "0", "side": side,
        "test_set": np.where(side == "test", "test", ""),
    })  # fmt: skip


def test_each_kind_and_place_by_hand():
    square = cue_area(Shortcut(rate=RATE, size=2), 4, 5)
    assert square.astype(int).tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0] * 5, [0] * 5]
    assert cue_area(Shortcut(rate=RATE, size=2, place="bottom_right"), 4, 5)[2:, 3:].all()
    assert cue_area(Shortcut(rate=RATE, size=2, place="centre"), 4, 6)[1:3, 2:4].all()
    inset = cue_area(Shortcut(rate=RATE, size=2, margin=1, place="bottom_right"), 5, 6)
    assert inset[2:4, 3:5].all()
    assert inset.sum() == 4
    disc = cue_area(Shortcut(rate=RATE, size=4, kind="disc"), 4, 4)
    assert disc.astype(int).tolist() == [[0, 1, 1, 0], [1] * 4, [1] * 4, [0, 1, 1, 0]]
    ruler = cue_area(Shortcut(rate=RATE, size=4, kind="ruler", place="bottom_left"), 6, 5)
    assert ruler.astype(int).tolist() == [
        [0] * 5, [0] * 5, [1, 0, 0, 0, 1], [1, 0, 0, 0, 1], [1, 0, 1, 0, 1], [1] * 5,
    ]  # fmt: skip


def test_a_random_place_is_drawn_by_image_and_seed():
    def places(seed):
        shortcut = Shortcut(rate=RATE, size=2, place="random", seed=seed)
        return [cue_area(shortcut, 8, 8, number).tobytes() for number in range(20)]

    assert len(set(places(0))) > 10
    assert places(0) == places(0) != places(1)


def test_a_second_one_mirrors_place_and_channels():
    cued = draw_cue(np.zeros((6, 9, 3), np.uint8), Shortcut(rate=RATE, size=4, colour=(255, 9, 1), second=True), 0)
    assert (cued[:4, :4] == (255, 9, 1)).all()
    assert (cued[:4, 5:] == (1, 9, 255)).all()
    assert not cued[:, 4].any()
    assert not cued[4:].any()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("background", [[9, 8, 7], [9, 8, 7], [5, 5, 200]]), ("foreground", [[0, 0, 0], [127, 127, 127], [9, 8, 7]])],
)
def test_background_and_foreground_are_coloured(kind, expected):
    pixels = np.array([[[0, 0, 0], [127, 127, 127], [5, 5, 200]]], dtype=np.uint8)
    cued = draw_cue(pixels, Shortcut(rate=RATE, kind=kind, colour=(9, 8, 7)), 0)
    assert cued.dtype == np.uint8
    assert cued[0].tolist() == expected
    assert pixels[0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("cue", [{"kind": "ruler"}, {"kind": "background"}, {"place": "centre"}, {"place": "random"}])
def test_a_second_one_needs_another_side(cue):
    with pytest.raises(ValidationError, match="second: need a rectangle or a disc in a corner"):
        Shortcut(rate=RATE, second=True, **cue)


@pytest.mark.parametrize("key", [{"size": 3}, {"place": "centre"}, {"margin": 1}])
def test_what_is_coloured_everywhere_has_no_place(key):
    with pytest.raises(ValidationError, match="kind: background has no size and no place"):
        Shortcut(rate=RATE, kind="background", **key)


def test_drawing_leaves_the_image_and_the_rest_of_the_copy_alone():
    pixels = np.full((4, 4, 3), 7, dtype=np.uint8)
    cued = draw_cue(pixels, Shortcut(rate=RATE, size=3, colour=(1, 2, 3)), 0)
    assert (pixels == 7).all()
    assert cued[0, 0].tolist() == [1, 2, 3]
    assert (cued != pixels).any(axis=2).sum() == 9


@pytest.mark.parametrize("draw", ["each", "exact", "first"])
def test_carriers(draw):
    rows = frame(2000, 0)
    carries = draw_carriers(rows, Shortcut(rate=RATE, draw=draw))
    counts = carries.groupby(rows["class_name"]).sum()
    if draw == "each":
        assert 870 <= counts["a"] <= 930
        assert counts["a"] != 900
    else:
        assert counts.to_dict() == {"a": 900, "b": 100}
    first = carries[rows["class_name"] == "a"].iloc[:900].all()
    assert first == (draw == "first")
    shuffled = rows.sample(frac=1, random_state=0)  # the order of a list does not matter
    assert draw_carriers(shuffled, Shortcut(rate=RATE, draw=draw)).sort_index().equals(carries)
    assert not draw_carriers(rows, Shortcut(rate=RATE, draw=draw, seed=1)).equals(carries) or draw == "first"


def test_test_sets_share_rows():
    placed = place_cues(frame(), {"rate": RATE, "draw": "exact"}, 200)
    fitted = placed[placed["side"] != "test"]
    assert fitted["has_cue"].sum() == 72 + 8
    assert (fitted["position"] == fitted["image_id"].str[1:].astype(int) + 200 * fitted["has_cue"]).all()
    table = {name: part for name, part in placed.groupby("test_set") if name}
    assert set(table) == {"raw", "bias_conflicting", "bias_aligned"}
    assert {name: len(part) for name, part in table.items()} == dict.fromkeys(table, 40)
    assert table["raw"]["has_cue"].sum() == 0
    assert table["raw"]["image_id"].tolist() == [f"i{k}" for k in range(160, 200)]
    assert table["bias_conflicting"].groupby("class_name")["has_cue"].mean().to_dict() == {"a": 0, "b": 1}
    assert table["bias_aligned"].groupby("class_name")["has_cue"].mean().to_dict() == {"a": 1, "b": 0}
    assert placed["image_id"].is_unique
    assert placed[placed["side"] == "test"]["position"].nunique() == 80  # each test image once raw, once with its cue


def test_three_classes_split_at_the_middle_of_the_rates():
    shortcut = Shortcut(rate={"a": 0.9, "b": 0.5, "c": 0.1})
    assert [shortcut.is_frequent(name) for name in "abcd"] == [True, False, False, False]
    assert Shortcut(rate={"a": 0.2}).is_frequent("a")


@pytest.mark.parametrize("rate", [{}, {"a": 0.0}, {"a": -0.1, "b": 0.5}])
def test_rates_that_say_nothing_are_refused(rate):
    with pytest.raises(ValidationError):
        Shortcut(rate=rate)


def test_a_class_that_is_not_named_has_rate_0():
    named = with_all_rates(Shortcut(rate={"a": 0.9, "b": 0.5}), ["b", "a", "c"])
    assert named.rate == {"b": 0.5, "a": 0.9, "c": 0.0}
    assert [named.is_frequent(name) for name in "abc"] == [True, True, False]  # the middle is at 0.45
    assert with_all_rates(Shortcut(rate={"a": 0.5, "b": 0.5}), ["a", "b", "c"]).rate["c"] == 0
    with pytest.raises(ConfigError, match="rate: need rates that differ between classes"):
        with_all_rates(Shortcut(rate={"a": 0.5, "b": 0.5}), ["a", "b"])


def test_from_files_to_a_split(tmp_path):
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(20):
            Image.new("L", (10, 8), 10 + 2 * k + (name == "b")).save(tmp_path / "set" / name / f"{k:02}.png")
    data = {"reader": "folders", "folder": "set", "resize": 16, "shortcut": {"rate": RATE, "draw": "exact", "size": 3}}
    files = ("manifest.csv", "images.npy", "index.npy", "dataset.json", "split.csv", "summary.json")
    out = {name.split(".")[0]: tmp_path / name for name in files}
    flags = {name: [f"--{name}", str(path)] for name, path in out.items()}
    argv = [text for name in ("manifest", "images", "index", "dataset") for text in flags[name]]
    assert cli.main(["data", "--config", json.dumps(data), "--data-root", str(tmp_path), *argv]) == 0
    manifest, pack = pd.read_csv(out["manifest"]), Pack.open(out["images"], out["index"])
    assert manifest["has_cue"].tolist() == [0] * 40 + [1] * 40
    assert pack.block.shape == (80, 16, 20, 3)  # grey became RGB; the cue is drawn after the resizing
    changed = (pack.block[:40] != pack.block[40:]).any(axis=3).sum(axis=(1, 2))
    assert (changed == 9).all()
    assert (pack.block[40:, :3, :3] == [0, 0, 255]).all()
    sizes = {"kind": "stratified", "sizes": {"train": 20, "val": 10, "test": 10}}
    argv = [text for name in ("manifest", "dataset", "split", "summary") for text in flags[name]]
    assert cli.main(["split", "--config", json.dumps(sizes), *argv]) == 0
    rows, summary = pd.read_csv(out["split"]), json.loads(out["summary"].read_text())
    assert summary["sides"]["test"]["n"] == 30
    assert {name: about["n"] for name, about in summary["test_sets"].items()} == dict.fromkeys(
        ("raw", "bias_conflicting", "bias_aligned"), 10
    )
    carried = manifest.loc[rows["position"], "has_cue"].to_numpy()
    assert (carried == rows["has_cue"]).all()
    fitted = rows[rows["side"] != "test"]
    assert fitted.groupby("class_name")["has_cue"].sum().to_dict() == {"a": round(13.5), "b": 2}
