"""Facts of the MaskTune reimplementation and of the official code on biased MNIST, by number.

Source: arXiv 2210.00055; the public repositories "Neural-Networks" (vmazashvili) and "Masktune" (aliasgharkhani).
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medmask.config.data import Dataset, Shortcut, Split
from medmask.data.readers import read_source
from medmask.data.shortcut import draw_cue
from medmask.data.split import make_split
from medmask.stages.data import hints

ROOT = Path(os.environ.get("MEDMASK_DATA", Path(__file__).resolve().parents[3] / "shared/data"))
RELABEL = {"0": [0, 1, 2, 3, 4], "1": [5, 6, 7, 8, 9]}
RATE = {"0": 0.99, "1": 0.01}
OFFICIAL = Shortcut(size=4, colour=(255, 0, 0), rate=RATE, draw="first")
NOTEBOOK = Shortcut(size=6, colour=(0, 0, 255), rate=RATE)


@pytest.fixture(scope="module")
def manifest() -> pd.DataFrame:
    if not (ROOT / "mnist").is_dir():
        pytest.skip(f"no MNIST in {ROOT}")
    source = read_source(ROOT, Dataset(reader="mnist", folder="mnist", relabel=RELABEL))
    table = source.table.assign(split_hint=hints(source), sha256=source.table["image_id"])
    return table.assign(label=table["class_name"].astype(int))


def split(manifest: pd.DataFrame, shortcut: Shortcut, val: float = 0.0) -> pd.DataFrame:
    dataset = {"classes": ["0", "1"], "lists": {"train": 60000, "test": 10000}, "n": 70000}
    dataset["shortcut"] = shortcut.model_dump(mode="json")
    return make_split(manifest, dataset, Split(kind="folders", val=val))[0]


def test_1_counts(manifest):
    rows = split(manifest, OFFICIAL, val=0.2)
    fitted = rows[rows["side"] != "test"]
    assert rows["side"].value_counts()[["train", "val"]].to_dict() == {"train": 48000, "val": 12000}
    assert fitted["label"].value_counts().to_dict() == {0: 30596, 1: 29404}
    assert fitted.groupby("label")["has_cue"].sum().to_dict() == {0: 30290, 1: 294}
    conflicting = rows[rows["test_set"] == "bias_conflicting"]
    assert conflicting["label"].value_counts().to_dict() == {0: 5139, 1: 4861}
    assert conflicting.groupby("label")["has_cue"].sum().to_dict() == {0: 0, 1: 4861}
    assert rows[rows["test_set"] == "raw"]["has_cue"].sum() == 0


def test_1_each_image_by_itself(manifest):
    """The notebook's draw: binomial counts, within 4 standard deviations of 30,290.04 and 294.04."""
    rows = split(manifest, NOTEBOOK)
    counts = rows[rows["side"] == "train"].groupby("label")["has_cue"].sum()
    assert abs(counts[0] - 30290) < 4 * 17.4
    assert abs(counts[1] - 294) < 4 * 17.1


@pytest.mark.parametrize(("shortcut", "n", "value"), [(NOTEBOOK, 36, [0, 0, 1]), (OFFICIAL, 16, [1, 0, 0])])
def test_2_pixels_of_the_cue(shortcut, n, value):
    cued = draw_cue(np.full((28, 28, 3), 9, dtype=np.uint8), shortcut, 0) / 255
    assert (cued == value).all(axis=2).sum() == n
    side = int(n**0.5)
    assert (cued[:side, :side] == value).all()
