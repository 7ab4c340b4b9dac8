"""What a training has learnt of its images, as files: weights.csv and soft_labels.csv."""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from medmask import io
from medmask.config.training import Training
from medmask.data.tables import read_frame
from medmask.methods.base import Method
from medmask.train.loader import Rows
from medmask.train.per_image import COLUMNS, recorded_epochs, table_of


def write_weights(path: Path, split: Path, side: Rows, work_dir: Path, cfg: Training) -> None:
    """What the method gave each training image in the epochs recorded; a header alone where it gives nothing."""
    names, is_flipped = image_ids(split), dict(zip(side.positions, side.labels != side.true_labels, strict=True))
    rows: list[dict[str, Any]] = []
    for epoch in recorded_epochs(work_dir, cfg.record_every, cfg.epochs):
        table = pd.read_csv(table_of(work_dir, epoch), dtype=str, keep_default_na=False)
        for row in table.to_dict("records"):
            place = int(row["position"])
            values = {name: row[name] for name in COLUMNS}
            rows.append({"image_id": names[place], "epoch": epoch, **values, "is_flipped": int(is_flipped[place])})
    io.write_csv(path, ("image_id", "epoch", *COLUMNS, "is_flipped"), rows)


def write_soft_labels(path: Path, split: Path, side: Rows, targets: Tensor | None, classes: list[str]) -> None:
    """The method's last target of each training image, scaled to a sum of 1; a header alone where it keeps none.

    Empty where an image has none, as one that was in no step (`drop_last` with a fixed order).
    """
    columns = [f"prob_{name}" for name in classes]
    names = image_ids(split)
    rows: list[dict[str, Any]] = []
    if targets is not None:
        targets = targets / targets.sum(1, keepdim=True).clamp(min=torch.finfo(targets.dtype).tiny)
        for place, values in zip(side.positions, targets.tolist(), strict=True):
            texts = (f"{value:.6g}" if any(values) else "" for value in values)
            rows.append({"image_id": names[place], **dict(zip(columns, texts, strict=True))})
    io.write_csv(path, ("image_id", *columns), rows)


def image_ids(split: Path) -> dict[int, str]:
    """Image ids by position in the pack."""
    table = read_frame(split, ("position", "image_id"))
    return dict(zip(table["position"], table["image_id"], strict=True))


def flip_notes(method: Method, side: Rows) -> list[str]:
    """A sentence where weights or trusts are given and there is no flipped label to find."""
    if set(method.memory()) & set(COLUMNS) and (side.labels == side.true_labels).all():
        return ["no training label is flipped, so nothing is said on how well weights or trusts find them"]
    return []
