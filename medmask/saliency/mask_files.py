"""Write the masks of a finetuning's training images as files; trainings make them from the maps and keep none."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from medmask import io
from medmask.artifacts import readable
from medmask.errors import ConfigError
from medmask.saliency.looks import Trained, masked_images

BATCH = 64
COLUMNS = ("image_id", "class_name", "side", "position", "hidden", "mask", "masked")
log = logging.getLogger(__name__)


def write_masks(run: Trained, rows: pd.DataFrame, folder: Path) -> None:
    """Two PNG files an image, `mask/*` (white keeps, black hides) and `masked/*`, and masks.csv, which names them.

    Images are at the size and in the colours that the masks were made for: as the network sees them, before random
    changes. All appear at once, when all are written; only one batch is in memory.

    Raises
    ------
    ConfigError : `folder` is something else than an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"--masks: {folder} is there and not empty; name a new folder")
    part = folder.absolute().with_name(f".part-{os.getpid()}-{folder.absolute().name}")
    try:
        for kind in ("mask", "masked"):
            (part / kind).mkdir(parents=True)
        io.write_csv(part / "masks.csv", COLUMNS, write_all(run, rows, part))
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_all(run: Trained, rows: pd.DataFrame, folder: Path) -> list[dict[str, Any]]:
    """Write the images; the rows of masks.csv."""
    told, written = 0, []
    for part, masks, pixels in masked_images(run, rows, BATCH):
        whites = (masks * 255).round().byte()[:, 0].numpy()  # (N, H, W)
        colours = (masks * pixels).round().byte().permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
        for row, mask, white, colour in zip(rows[part].itertuples(), masks, whites, colours, strict=True):
            name = f"{row.position:06d}-{readable(str(row.image_id))[-80:]}.png"
            Image.fromarray(white).save(folder / "mask" / name)
            Image.fromarray(colour[..., 0] if colour.shape[-1] == 1 else colour).save(folder / "masked" / name)
            written.append({
                **{column: getattr(row, column) for column in COLUMNS[:4]},
                "hidden": round(1 - float(mask.mean()), 6), "mask": f"mask/{name}", "masked": f"masked/{name}",
            })  # fmt: skip
        if 10 * part.stop // len(rows) > told:  # a line each tenth
            told = 10 * part.stop // len(rows)
            log.info("masks: %d of %d images", part.stop, len(rows))
    return written
