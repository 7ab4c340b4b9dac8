"""The rows that a training reads: its sides of the split with the labels that the settings name."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medmask.config.finetuning import ConfidentLearning, Fold
from medmask.data.audit import assign_folds, describe_search, judge_search
from medmask.data.pack import Pack
from medmask.data.tables import read_frame, read_split, refuse, short_digests
from medmask.errors import ConfigError, DataError
from medmask.train.loader import Rows

TREATED = {"remove": "errors found are left out", "reweight": "errors found weigh as much as their label is likely"}


def read_labelled(
    images: Path, index: Path, split: Path, summary: Path, labels: Path
) -> tuple[pd.DataFrame, list[str]]:
    """The rows of a split, each with true_label and noisy_label, in the order of its file; and the classes."""
    needed = ("position", "group", "sha256")
    rows, classes = read_split(split, summary, needed, len(Pack.open(images, index)))
    table = read_frame(labels, ("image_id", "true_label", "noisy_label"))
    names = table["image_id"]
    problems = [f"image {name} stands twice" for name in names[names.duplicated()]]
    problems += [f"image {name} is not in {split}" for name in names[~names.isin(rows["image_id"])]]
    problems += [f"no label for image {name}" for name in rows["image_id"][~rows["image_id"].isin(names)]]
    refuse(labels, problems)
    found = rows.merge(table, on="image_id", validate="one_to_one")  # in the order of `rows`
    last = len(classes) - 1
    bad = ~(found["noisy_label"].between(0, last) & found["true_label"].between(0, last))
    refuse(labels, [f"image {name}: label outside 0..{last}" for name in found["image_id"][bad]])
    other = found["image_id"][found["true_label"] != found["label"]]
    refuse(labels, [f"image {name}: true_label is not the label in {split}" for name in other])
    return found, classes


def read_sides(cfg: Any, files: Any) -> tuple[dict[str, Rows], np.ndarray]:
    """Training, validation and trusted rows with the labels that the settings name, and the digests of their pixels.

    Trusted images have their true labels, and are training images too where `train_on` says so. `method: fold` leaves
    one fold of the training images out. Digests: (n,) int64.
    """
    table, classes = read_labelled(files.images, files.index, files.split, files.summary, files.labels)
    found = {side: table[table["side"] == side] for side in ("train", "val", "meta_set")}
    if "in_meta_set" in table:  # trusted, and on another side too
        found["meta_set"] = table[(table["side"] == "meta_set") | (table["in_meta_set"] == 1)]
    if isinstance(cfg, Fold):
        rows = found["train"]
        folds = assign_folds(rows["noisy_label"].to_numpy(), rows["group"], cfg.folds, cfg.seed, classes)
        found["train"] = rows[folds != cfg.fold]
    labels_of = {"train": cfg.train_labels, "val": cfg.validation_labels, "meta_set": "true"}
    sides = {
        side: Rows(*(rows[name].to_numpy() for name in ("position", f"{labels_of[side]}_label", "true_label")))
        for side, rows in found.items()
    }
    if missing := [side for side in cfg.train_on if not len(sides[side])]:
        raise DataError(f"{files.split}: no images on the side {' or '.join(missing)}")
    if {"train", "meta_set"} <= set(cfg.train_on):  # an image that is on both counts once, with its true label
        train = sides["train"]
        sides["train"] = chosen(train, ~np.isin(train.positions, sides["meta_set"].positions))
    sides["train"] = joined([sides[side] for side in cfg.train_on])
    used = {*cfg.train_on, "val", *(["meta_set"] if hasattr(cfg, "meta") else [])}
    digests = [short_digests(found[side]["sha256"]) for side in found if side in used]
    return sides, np.concatenate(digests)


def chosen(rows: Rows, is_kept: np.ndarray) -> Rows:
    """Some of the rows, by (n,) bool."""
    return Rows(*(getattr(rows, item.name)[is_kept] for item in fields(Rows)))


def joined(parts: list[Rows]) -> Rows:
    return Rows(*(np.concatenate([getattr(rows, item.name) for rows in parts]) for item in fields(Rows)))


def apply_audit(
    cfg: Any, audit: Path | None, sides: dict[str, Rows], classes: list[str]
) -> tuple[Rows, np.ndarray | None, list[str]]:
    """Training rows without the label errors that an audit found, or all of them with weights; notes.

    Returns
    -------
    Rows : what is trained on.
    ndarray, (n,), float64, mean 1, or None : an error found weighs as its label is likely, any other label fully.
    list of str : what was found.

    Raises
    ------
    DataError : the audit is of other images or labels, or no image of a class would be left.
    """
    rows = sides["train"]
    if isinstance(cfg, ConfidentLearning) != (audit is not None):
        raise ConfigError("--audit: needed by `method: confident`, and only there")
    if audit is None:
        return rows, None, []
    table = read_frame(audit, ("position", "given", "quality", "is_error", "is_flipped")).set_index("position")
    trusted = np.isin(rows.positions, sides["meta_set"].positions) & ("meta_set" in cfg.train_on)
    judged = rows.positions[~trusted]
    if set(judged) != set(table.index) or len(judged) != len(table):
        raise DataError(f"{audit}: judges {len(table)} images, which are not the {len(judged)} training images")
    own = table.loc[judged]
    if (own["given"].to_numpy() != np.array(classes)[rows.labels[~trusted]]).any():
        raise DataError(f"{audit}: judges other labels than those of this training")
    is_error, quality = np.zeros(len(rows), dtype=bool), np.ones(len(rows))
    is_error[~trusted], quality[~trusted] = own["is_error"] == 1, own["quality"].astype(float)
    facts = judge_search(own["is_error"].to_numpy() == 1, own["is_flipped"].to_numpy() == 1)
    notes = [f"{describe_search(facts)}: {TREATED[cfg.errors]}"]
    if cfg.errors == "reweight":
        weights = np.where(is_error, quality, 1.0)
        return rows, weights / weights.mean(), notes
    lost = np.setdiff1d(rows.labels, rows.labels[~is_error])
    if len(lost):
        names = ", ".join(classes[label] for label in lost)
        raise DataError(
            f"{audit}: all labels {names} are probably wrong, so that no such image would be left; "
            "set `errors: reweight`, or fewer `folds`"
        )
    return chosen(rows, ~is_error), None, notes
