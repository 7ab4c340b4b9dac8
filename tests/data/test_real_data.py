"""Readers on the real files, where they are: MNIST, BUSI, and the ISIC 2019 images of HAM10000."""

import os
from pathlib import Path

import pytest

from medmask.config.data import Dataset
from medmask.data.readers import read_source

ROOT = Path(os.environ.get("MEDMASK_DATA", Path(__file__).resolve().parents[3] / "shared/data"))
LISTS = "lists_available/ISIC_2019_Training_GroundTruth_{}_available.csv"


def read(**settings):
    cfg = Dataset(**settings)
    if not (ROOT / cfg.folder).is_dir():
        pytest.skip(f"no {cfg.folder} in {ROOT}")
    return read_source(ROOT, cfg)


def test_mnist():
    source = read(reader="mnist", folder="mnist")
    assert {name: len(images) for name, images in source.lists.items()} == {"train": 60000, "test": 10000}
    test = source.table["class_name"].iloc[60000:].value_counts()
    assert [test[name] for name in source.classes] == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_busi():
    source = read(reader="folders", folder="busi_256")
    assert source.table["class_name"].value_counts().to_dict() == {"benign": 280, "malignant": 135, "normal": 85}
    assert source.load(0).size == (256, 256)


def test_busi_masks_are_left_out():
    source = read(reader="folders", folder="busi/Dataset_BUSI_with_GT")
    assert source.table["class_name"].value_counts().to_dict() == {"benign": 28, "malignant": 28, "normal": 28}


def test_isic_images():
    source = read(
        reader="isic2019",
        folder="isic2019",
        labels="images_available_GroundTruth.csv",
        lists={"train": LISTS.format("sub5000_train"), "test": LISTS.format("sub1250_test")},
    )
    counts = source.table["class_name"].value_counts().to_dict()
    assert counts == {"MEL": 480, "NV": 1700, "BCC": 358, "AK": 84, "BKL": 480, "DF": 72, "VASC": 94, "SCC": 137}
    assert source.table["group"].nunique() == 3053
    assert {name: len(images) for name, images in source.lists.items()} == {"train": 1940, "test": 475}
    assert source.lists["train"][:2] == ["ISIC_0032222", "ISIC_0028245"]  # the list's order
    assert source.load(0).size == (200, 150)
