"""Labels that are probably wrong: folds of the training images, and confident learning. Pure functions."""

import warnings
from typing import Any

import numpy as np
import pandas as pd

from medmask.config.base import CLEANLAB
from medmask.data.groups import assign_groups
from medmask.errors import ConfigError, DataError


def assign_folds(labels: np.ndarray, groups: pd.Series, folds: int, seed: int, classes: list[str]) -> np.ndarray:
    """Share training images out to folds; whole groups, and of each class nearly as many to each fold.

    Parameters
    ----------
    labels : ndarray, (N,), int64. The given labels, which may be wrong.
    groups : (N,). Patient, lesion or cluster of each image, as in split.csv: near-duplicates stay together.
    seed : that of the trainings, so that they and the audit share the same folds.

    Returns
    -------
    ndarray, (N,), int64, in 0..folds-1.

    Raises
    ------
    DataError : a class that has images has fewer groups than folds, so that some fold would have none of it.
    """
    units = groups.factorize()[0]
    counts = np.zeros((units.max(initial=-1) + 1, len(classes)), dtype=np.int64)
    np.add.at(counts, (units, labels), 1)
    few = {name: int(n) for name, n in zip(classes, (counts > 0).sum(axis=0), strict=True) if 0 < n < folds}
    if few or not len(labels):
        found = ", ".join(f"{name} {n}" for name, n in few.items()) or "no image at all"
        raise DataError(f"folds: need at least {folds} groups of images with each given label, got {found}")
    ends = np.arange(folds + 1) * len(labels) // folds
    return assign_groups(counts, np.diff(ends), np.random.default_rng([seed, *b"folds"]))[units]


def find_errors(labels: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Confident learning: which labels are probably wrong, by out-of-sample predictions.

    Parameters
    ----------
    labels : ndarray, (N,), int64. The given labels. probs : ndarray, (N, K), float64, rows sum to 1.

    Returns
    -------
    ndarray, (N,), bool : label errors found; of each pair of classes as many as its share in the confident joint says.
    ndarray, (N,), float64, in [0, 1] : quality of each label, its predicted probability.
    list of str : what cleanlab had to say.

    Raises
    ------
    ConfigError : cleanlab is not installed. DataError : a prediction is not finite, or there are no two classes.

    Source: Northcutt et al., JAIR 2021, arXiv 1911.00068; cleanlab.filter with `prune_by_noise_rate`, its default.
    """
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError as error:
        raise ConfigError(f"audit: {CLEANLAB}") from error
    if not np.isfinite(probs).all():
        raise DataError("audit: a network predicts NaN or infinite probabilities; look at its training")
    if len(np.unique(labels)) < 2:
        raise DataError("audit: all given labels are of one class, so none can be told to be wrong")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = find_label_issues(labels, probs, n_jobs=1)
        quality = get_label_quality_scores(labels, probs)
    notes = list(dict.fromkeys(" ".join(str(warning.message).split()) for warning in said))
    absent = set(range(probs.shape[1])) - set(labels.tolist())  # as UNK of ISIC 2019: there is nothing to find in it
    return found, quality, [note for note in notes if not any(f"in class: {k}," in note for k in absent)]


def judge_search(found: np.ndarray, is_flipped: np.ndarray) -> dict[str, Any]:
    """How well errors were found, where it is known which labels are flipped: (N,) bool, (N,) bool.

    precision : flipped ones among those found. recall : found ones among the flipped. None where there are none.
    """
    both, n, flipped = int((found & is_flipped).sum()), int(found.sum()), int(is_flipped.sum())
    return {
        "judged": len(found),
        "found": n,
        "flipped": flipped,
        "found_flipped": both,
        "precision": both / n if n else None,
        "recall": both / flipped if flipped else None,
    }


def describe_search(facts: dict[str, Any]) -> str:
    """A sentence on what `judge_search` found; on how much of it is right where some label is known to be flipped."""
    if not facts["found"]:
        return f"none of {facts['judged']} labels is probably wrong"
    text = f"{facts['found']} of {facts['judged']} labels are probably wrong"
    if not facts["flipped"]:
        return text
    shares = ", ".join(f"{name} {facts[name]:.3f}" for name in ("precision", "recall"))
    return f"{text} ({facts['found_flipped']} of them among the {facts['flipped']} flipped ones, {shares})"
