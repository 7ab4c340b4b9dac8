"""Stage noise: flip labels at random, an exact number a side. The test side and the meta set keep theirs."""

import logging
from pathlib import Path

import numpy as np

from medmask import io
from medmask.config.data import Noise
from medmask.data.noise import count_flips, describe_noise, draw_transition, flip_symmetric
from medmask.data.tables import read_split
from medmask.errors import DataError

log = logging.getLogger(__name__)

CONFIG, INPUTS, OPTIONAL, OUTPUTS = Noise, ("split", "summary"), (), ("labels", "transition", "figure")


def run(cfg: Noise, *, split: Path, summary: Path, labels: Path, transition: Path, figure: Path) -> None:
    table, classes = read_split(split, summary, ())
    true = table["label"].to_numpy()
    targets = np.unique(true) if cfg.targets == "occurring" else np.arange(len(classes))
    if cfg.rate > 0 and len(targets) < 2:
        raise DataError(f"noise.targets: {split} has a single class, so no label can move to another")
    noisy, facts = true.copy(), {}
    for side in ("train", "val"):
        rows = np.flatnonzero(table["side"] == side)
        if side in cfg.sides:
            rng = np.random.default_rng([cfg.seed, *f"noise {side}".encode()])
            noisy[rows] = flip_symmetric(true[rows], count_flips(len(rows), cfg.rate), targets, rng)
        facts[side] = describe_noise(true[rows], noisy[rows], len(classes))
        log.info("%s: %d of %d labels flipped", side, facts[side]["flipped"], facts[side]["n"])
    out = table[["image_id"]].assign(true_label=true, noisy_label=noisy, is_flipped=(true != noisy).astype(int))
    out.to_csv(labels, index=False, lineterminator="\n")
    io.write_json(transition, {"classes": classes, **facts})
    draw_transition(figure, classes, facts)
