"""Stage split: put each image on a side: train, val, test, meta_set."""

import logging
from pathlib import Path

from medmask import io
from medmask.config.data import Split
from medmask.data.split import make_split
from medmask.data.tables import read_frame

log = logging.getLogger(__name__)

CONFIG, INPUTS, OPTIONAL, OUTPUTS = Split, ("manifest", "dataset"), (), ("split", "summary")
NEEDED = ("image_id", "label", "class_name", "group", "split_hint", "sha256")


def run(cfg: Split, *, manifest: Path, dataset: Path, split: Path, summary: Path) -> None:
    rows, facts = make_split(read_frame(manifest, NEEDED), io.read_json(dataset), cfg)
    for side, about in facts["sides"].items():
        if about["n"]:
            log.info("%s: %d images of %d groups", side, about["n"], about["groups"])
    for note in facts["notes"]:
        log.warning(note)
    rows.to_csv(split, index=False, lineterminator="\n")
    io.write_json(summary, facts)
