"""Stage audit: find training labels that are probably wrong, each judged by a network that has not trained on it."""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medmask import io
from medmask.config.finetuning import Audit
from medmask.config.training import Image
from medmask.data.audit import assign_folds, describe_search, find_errors, judge_search
from medmask.data.tables import short_digests
from medmask.errors import ConfigError, DataError

CONFIG = Audit
INPUTS: tuple[str, ...] = ("images", "index", "split", "summary", "labels")
LISTS: tuple[str, ...] = ("networks",)
OPTIONAL: tuple[str, ...] = ()
OUTPUTS: tuple[str, ...] = ("audit", "record")

BATCH_SIZE = 256
log = logging.getLogger(__name__)


def run(
    cfg: Audit, *, images: Path, index: Path, split: Path, summary: Path, labels: Path, networks: list[Path],
    audit: Path, record: Path,
) -> None:  # fmt: skip
    from medmask.stages.sides import read_labelled

    if len(networks) != cfg.folds:
        raise ConfigError(f"--networks: need one for each of {cfg.folds} folds, got {len(networks)}")
    began = time.monotonic()
    rows, classes = read_labelled(images, index, split, summary, labels)
    train, val = (rows[rows["side"] == side] for side in ("train", "val"))
    given = train["noisy_label"].to_numpy()
    fold = assign_folds(given, train["group"], cfg.folds, cfg.seed, classes)
    judged = np.ones(len(train), dtype=bool)
    if "meta_set" in cfg.train_on and "in_meta_set" in train:  # trusted images are in all trainings, as true
        judged = train["in_meta_set"].to_numpy() != 1
    train, given, fold = train[judged], given[judged], fold[judged]
    if train.empty:
        raise DataError(f"{split}: all training images are trusted ones, so there is no label to judge")
    probs = np.zeros((len(train), len(classes)))
    for number, path in enumerate(networks):
        part = train[fold == number]
        if part.empty:
            continue
        probs[fold == number] = predict_unseen(path, part, val, classes, (images, index), cfg)
        log.info("fold %d of %d: %d images", number + 1, cfg.folds, len(part))
    found, quality, notes = find_errors(given, probs)
    is_flipped = given != train["true_label"].to_numpy()
    facts: dict[str, Any] = {"folds": cfg.folds, **judge_search(found, is_flipped)}
    names = np.array(classes)
    table = train[["image_id", "position"]].assign(
        fold=fold, given=names[given], suggested=names[probs.argmax(axis=1)], quality=[f"{q:.9g}" for q in quality],
        is_error=found.astype(int), is_flipped=is_flipped.astype(int),
    )  # fmt: skip
    table.to_csv(audit, index=False, lineterminator="\n")
    facts |= {"agreement": float((probs.argmax(axis=1) == given).mean()), "notes": notes}
    io.write_json(record, {**facts, "seconds": round(time.monotonic() - began, 2)})
    for text in (*notes, describe_search(facts)):
        log.info("%s", text)


def predict_unseen(
    path: Path, part: pd.DataFrame, val: pd.DataFrame, classes: list[str], pack: tuple[Path, Path], cfg: Audit
) -> np.ndarray:
    """Probabilities (n, K) of the images of one fold by the network that left them out.

    Raises
    ------
    ConfigError : the network has trained on one of them, by the digests of their pixels, or knows other classes.
    """
    from medmask.data.images import eval_batches
    from medmask.evaluation.predict import pick_device, predict_probs
    from medmask.models.weights import load_classifier

    network, spec, seen = load_classifier(path)
    if spec.classes != classes:
        raise ConfigError(f"--networks: {path} knows the classes {spec.classes}, the data have {classes}")
    own = np.setdiff1d(short_digests(part["sha256"]), short_digests(val["sha256"]))  # those only choose an epoch
    if n := len(np.intersect1d(own, seen)):
        raise ConfigError(f"--networks: {path} has trained on {n} of the images whose labels it is to judge")
    image, device = Image.model_validate(spec.image), pick_device(cfg.needs)
    return predict_probs(network, eval_batches(*pack, part["position"].to_numpy(), image, BATCH_SIZE), device)
