"""What is remembered of each training image, in numbers and files: how well weights and trusts find flipped labels."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from medmask import io
from medmask.evaluation.metrics import auroc
from medmask.train.loader import Rows

COLUMNS = ("weight", "trust")
FOLDER = "per_image"


def numbers_of(memory: Mapping[str, Tensor], side: Rows) -> dict[str, float]:
    """Numbers for the history; none without flipped labels, and none of what no image has.

    flipped_as_true, flipped_as_given : share of the flipped images that were classified so when last trained on
    auroc_weight, auroc_trust : of low values for flipped labels; 0.5 is chance
    flipped_mended, clean_kept : share of the flipped, and of the other, images whose target is the true class
    """
    known = {name: values.double().cpu().numpy() for name, values in memory.items() if values.dim() == 1}
    is_flipped = side.labels != side.true_labels
    if not is_flipped.any():
        return {}
    found = {}

    def share(name: str, column: str, rows: np.ndarray, wanted: np.ndarray) -> None:
        values = known.get(column, np.empty(0))
        if len(values) and (rows := rows & ~np.isnan(values)).any():
            found[f"train/{name}"] = float((values[rows] == wanted[rows]).mean())

    share("flipped_as_true", "predicted", is_flipped, side.true_labels)
    share("flipped_as_given", "predicted", is_flipped, side.labels)
    share("flipped_mended", "label", is_flipped, side.true_labels)
    share("clean_kept", "label", ~is_flipped, side.true_labels)
    for name in COLUMNS:
        if name in known and len(set(is_flipped[seen := ~np.isnan(known[name])])) == 2:
            scores = -known[name][seen]
            found[f"train/auroc_{name}"] = float(auroc(scores, is_flipped[seen], np.ones((1, len(scores))))[0])
    return found


def histograms_of(memory: Mapping[str, Tensor], side: Rows) -> dict[str, np.ndarray]:
    """Weights and trusts of clean and of flipped images, for TensorBoard."""
    is_flipped = side.labels != side.true_labels
    found = {}
    for name in COLUMNS:
        if name in memory:
            values = memory[name].cpu().numpy()
            for kind, rows in (("clean", ~is_flipped), ("flipped", is_flipped)):
                found[f"{name}/{kind}"] = values[rows & ~np.isnan(values)]
    return {name: values for name, values in found.items() if len(values)}


def is_recorded(epoch: int, every: int, epochs: int) -> bool:
    """Whether an epoch, counted from 1, has a table of its images."""
    return epoch % every == 0 or epoch == epochs


def table_of(work_dir: Path, epoch: int) -> Path:
    return Path(work_dir) / FOLDER / f"{epoch:05d}.csv"


def write_table(work_dir: Path, epoch: int, memory: Mapping[str, Tensor], side: Rows) -> None:
    """One row a training image: position in the pack, weight, trust; empty what it has not."""
    columns = {name: memory[name].tolist() for name in COLUMNS if name in memory}
    if columns:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        places = ({"position": int(place)} for place in side.positions)
        lines = (
            {**place, **{k: f"{v:.6g}" for k, v in row.items() if v == v}}
            for place, row in zip(places, rows, strict=True)
        )
        io.write_csv(table_of(work_dir, epoch), ("position", *COLUMNS), lines)


def recorded_epochs(work_dir: Path, every: int, epochs: int) -> list[int]:
    """The epochs, counted from 1, of which this training has a table."""
    stems = [path.stem for path in (Path(work_dir) / FOLDER).glob("*.csv")]
    found = [int(stem) for stem in stems if re.fullmatch(r"\d+", stem)]
    return sorted(epoch for epoch in found if epoch <= epochs and is_recorded(epoch, every, epochs))
