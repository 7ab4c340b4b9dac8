"""Stage split: put each image on a side: train, val, test, meta_set."""

import logging
from pathlib import Path

from medmask import io
from medmask.config.data import Split
from medmask.data.split import make_split
from medmask.data.tables import read_facts, read_frame
from medmask.errors import DataError

log = logging.getLogger(__name__)

CONFIG, INPUTS, OPTIONAL, OUTPUTS = Split, ("manifest", "dataset"), (), ("split", "summary")
NEEDED = ("image_id", "label", "class_name", "group", "split_hint", "sha256")


def run(cfg: Split, *, manifest: Path, dataset: Path, split: Path, summary: Path) -> None:
    table, about = read_frame(manifest, NEEDED), read_facts(dataset, classes=list, n=int, lists=dict, orders=dict)
    if "has_cue" in table:
        table = table[table["has_cue"] == 0]
    if len(table) != about["n"]:
        raise DataError(f"{manifest}: {len(table)} rows, but {dataset} counts {about['n']} images")
    rows, facts = make_split(table, about, cfg)
    for side, counts in facts["sides"].items():
        if counts["n"]:
            log.info("%s: %d images of %d groups", side, counts["n"], counts["groups"])
    for note in facts["notes"]:
        log.warning(note)
    rows.to_csv(split, index=False, lineterminator="\n")
    io.write_json(summary, facts)
