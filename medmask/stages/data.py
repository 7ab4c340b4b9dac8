"""Stage data: read a dataset into a manifest and one packed file of pixels. Nothing later opens an image file."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medmask import io
from medmask.config.data import Dataset
from medmask.data.pack import write_pack
from medmask.data.readers import read_source
from medmask.data.shortcut import with_all_rates, with_cues
from medmask.data.tables import Source
from medmask.errors import DataError

log = logging.getLogger(__name__)

CONFIG, INPUTS, OPTIONAL, OUTPUTS = Dataset, (), (), ("manifest", "images", "index", "dataset")
NEEDS_DATA_ROOT = True
COLUMNS = (
    "image_id", "path", "label", "class_name", "group", "split_hint", "sha256", "width", "height", "phash",
)  # fmt: skip


def run(cfg: Dataset, *, data_root: Path, manifest: Path, images: Path, index: Path, dataset: Path) -> None:
    source = read_source(data_root, cfg)
    if source.problems:
        log.warning(
            "%d problems in the tables; reading the images too, to name all that is wrong", len(source.problems)
        )
    elif len(found := sorted(set(source.table["class_name"]))) < 2:
        raise DataError(
            f"{data_root / cfg.folder}: need images of two classes or more, got {' and '.join(found) or 'none'}"
        )
    log.info("%s: %d images, %d classes", cfg.reader, len(source.table), len(source.classes))
    n = len(source.table)
    shortcut = None if cfg.shortcut is None else with_all_rates(cfg.shortcut, source.classes)
    if shortcut is not None:
        source = with_cues(source, shortcut, cfg.resize)
    facts = write_pack(source, images, index, cfg.resize)
    table = source.table.join(facts)
    table["label"] = table["class_name"].map({name: label for label, name in enumerate(source.classes)})
    table["split_hint"] = hints(source)
    columns = list(COLUMNS)
    if shortcut is not None:
        table["has_cue"] = (np.arange(len(table)) >= n).astype(int)
        columns.append("has_cue")
    table[columns].to_csv(manifest, index=False, lineterminator="\n")
    about = summarise(cfg, source, table[:n])
    if shortcut is not None:
        about["shortcut"] = shortcut.model_dump(mode="json")
    io.write_json(dataset, about)


def hints(source: Source) -> pd.Series:
    """Names of the lists that each image stands in."""
    names: dict[str, list[str]] = {image: [] for image in source.table["image_id"]}
    for name, images in source.lists.items():
        for image in images:
            names[image].append(name)
    return source.table["image_id"].map({image: ";".join(lists) for image, lists in names.items()})


def summarise(cfg: Dataset, source: Source, table: pd.DataFrame) -> dict[str, Any]:
    """What dataset.json holds. `orders` has the positions of those lists that are not in the order of the manifest."""
    position = {image: number for number, image in enumerate(table["image_id"])}
    orders = {name: [position[image] for image in images] for name, images in source.lists.items()}
    counts = table["class_name"].value_counts().to_dict()
    return {
        "classes": list(source.classes),
        "n": len(table),
        "counts": {name: counts.get(name, 0) for name in source.classes},
        "lists": {name: len(images) for name, images in source.lists.items()},
        "reader": cfg.reader,
        "duplicates": find_duplicates(table),
        "orders": {name: order for name, order in orders.items() if order != sorted(order)},
    }


def find_duplicates(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Each image that repeats the pixels of an earlier one, after the first image with these pixels."""
    first = table.groupby("sha256")[["image_id", "class_name"]].transform("first")
    repeats = first["image_id"] != table["image_id"]
    mixed = int((repeats & (first["class_name"] != table["class_name"])).sum())
    if repeats.any():
        log.warning(
            "%d images repeat the pixels of an earlier one, %d of them under another class", repeats.sum(), mixed
        )
    return list(zip(first["image_id"][repeats], table["image_id"][repeats], strict=True))
