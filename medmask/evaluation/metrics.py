"""Classification metrics, each over many weightings of the test images at once.

A metric takes a `Sample` and weights (B, N) and returns B values. One row of ones gives the metric itself, rows of
resampling counts give its bootstrap draws: one definition serves both. NaN marks a draw that leaves it undefined.
Macro averages run over the classes that have images, in the test set or in the draw, never over the absent ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ECE_BINS = 15
ECE_MIN_IMAGES = 500
SPECIFICITY = 0.9


@dataclass(frozen=True, eq=False)
class Sample:
    """What a network said about the images of one test set.

    Parameters
    ----------
    labels : ndarray, (N,), int, in 0..K-1: the true classes.
    probs : ndarray, (N, K), float64.
    has_cue : ndarray, (N,), bool: the image carries a spurious cue; None where cues are unknown.
    """

    labels: NDArray[np.int64]
    probs: Array
    has_cue: NDArray[np.bool_] | None = None

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class; the first one of equals."""
        return self.probs.argmax(axis=1)

    @property
    def n_classes(self) -> int:
        return int(self.probs.shape[1])

    @cached_property
    def present(self) -> NDArray[np.int64]:
        """Classes that have images, ascending."""
        return np.unique(self.labels)


def value(name: str, sample: Sample) -> float:
    """One metric of one sample, each image counted once."""
    return float(METRICS[name](sample, np.ones((1, len(sample.labels))))[0])


def why_undefined(name: str, sample: Sample) -> str | None:
    """Why a metric cannot be computed for a sample; None if it can."""
    n, present = len(sample.labels), len(sample.present)
    if n == 0:
        return "the test set has no images"
    if name == "auroc_macro" and present < 2:
        return f"needs two classes with images, got {present}"
    if name == "sensitivity_at_90_specificity" and (sample.n_classes != 2 or present < 2):
        return f"needs two classes, both with images, got {sample.n_classes} classes, {present} with images"
    if name == "ece" and n <= ECE_MIN_IMAGES:
        return f"needs more than {ECE_MIN_IMAGES} images, got {n}"
    if name == "worst_group_accuracy" and sample.has_cue is None:
        return "needs images that are known to carry a cue or not"
    return None


def one_hot(index: NDArray[np.int64], size: int) -> Array:
    return np.eye(size)[index]


def ratio(top: Array, bottom: Array) -> Array:
    """Elementwise quotient; NaN where the denominator is zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(bottom > 0, top / bottom, np.nan)


def nanmean(values: Array) -> Array:
    """Mean over the last axis of what is not NaN; NaN where nothing is left, without a warning."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0).sum(-1), known.sum(-1))


def class_counts(sample: Sample, weights: Array) -> tuple[Array, Array, Array]:
    """Weight of the images of each class, of those predicted as it, and of those rightly so; each (B, K)."""
    of_class = one_hot(sample.labels, sample.n_classes)
    as_class = one_hot(sample.predicted, sample.n_classes)
    return weights @ of_class, weights @ as_class, weights @ (of_class * as_class)


def accuracy(sample: Sample, weights: Array) -> Array:
    """Share of the images whose most probable class is the true one."""
    return ratio(weights @ (sample.predicted == sample.labels).astype(float), weights.sum(1))


def recall_macro(sample: Sample, weights: Array) -> Array:
    """Mean recall over the classes present."""
    support, _, correct = class_counts(sample, weights)
    return nanmean(ratio(correct, support))


def precision_macro(sample: Sample, weights: Array) -> Array:
    """Mean precision over the classes present; a class that is never predicted has precision 0."""
    support, claimed, correct = class_counts(sample, weights)
    return nanmean(np.where(support > 0, np.nan_to_num(ratio(correct, claimed)), np.nan))


def f1_macro(sample: Sample, weights: Array) -> Array:
    """Mean F1 over the classes present."""
    support, claimed, correct = class_counts(sample, weights)
    return nanmean(np.where(support > 0, ratio(2 * correct, support + claimed), np.nan))


def auroc(scores: Array, positive: NDArray[np.bool_], weights: Array) -> Array:
    """Probability that a positive scores above a negative, ties counting half; NaN where either side is empty."""
    order = np.argsort(scores[~positive], kind="stable")
    negatives = scores[~positive][order]
    below = np.zeros((len(weights), len(negatives) + 1))  # below[:, i]: weight of the i lowest negatives
    np.cumsum(weights[:, ~positive][:, order], axis=1, out=below[:, 1:])
    low = np.searchsorted(negatives, scores[positive], side="left")
    high = np.searchsorted(negatives, scores[positive], side="right")
    wins = (weights[:, positive] * (below[:, low] + below[:, high])).sum(1) / 2
    return ratio(wins, weights[:, positive].sum(1) * below[:, -1])


def auroc_by_class(sample: Sample, weights: Array) -> Array:
    """One-vs-rest AUROC of each class present; (B, number present)."""
    return np.stack([auroc(sample.probs[:, k], sample.labels == k, weights) for k in sample.present], axis=1)


def auroc_macro(sample: Sample, weights: Array) -> Array:
    """Mean one-vs-rest AUROC over the classes present."""
    return nanmean(auroc_by_class(sample, weights))


def sensitivity_at_90_specificity(sample: Sample, weights: Array) -> Array:
    """Largest recall of class 1 over all thresholds that keep 90 % of class 0 below them; two classes only."""
    scores = sample.probs[:, 1]
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=np.nan))  # last image of each run of equal scores
    positive = sample.labels[order] == 1
    hits = np.cumsum(weights[:, order] * positive, axis=1)[:, ends]
    alarms = np.cumsum(weights[:, order] * ~positive, axis=1)[:, ends]
    allowed = alarms <= (1 - SPECIFICITY) * alarms[:, -1:] + 1e-9
    best = ratio(np.where(allowed, hits, 0).max(1), hits[:, -1])
    return np.where(alarms[:, -1] > 0, best, np.nan)


def ece_bin(confidence: Array) -> NDArray[np.int64]:
    return np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)


def ece(sample: Sample, weights: Array) -> Array:
    """Expected calibration error of the most probable class over 15 equal bins of its probability.

    Source: Guo et al., ICML 2017.
    """
    confidence = sample.probs.max(axis=1)
    gap = (sample.predicted == sample.labels) - confidence
    by_bin = weights @ (one_hot(ece_bin(confidence), ECE_BINS) * gap[:, None])
    return np.abs(by_bin).sum(1) / weights.sum(1)


def worst_group_accuracy(sample: Sample, weights: Array) -> Array:
    """Lowest accuracy over the groups (class, carries the cue or not) that have images."""
    assert sample.has_cue is not None
    member = one_hot(sample.labels * 2 + sample.has_cue, 2 * sample.n_classes)
    correct = (sample.predicted == sample.labels)[:, None]
    by_group = ratio(weights @ (member * correct), weights @ member)
    return np.where(np.isnan(by_group), np.inf, by_group).min(1)


METRICS: dict[str, Callable[[Sample, Array], Array]] = {
    "accuracy": accuracy,
    "balanced_accuracy": recall_macro,  # the same number, under the name that papers use
    "precision_macro": precision_macro,
    "recall_macro": recall_macro,
    "f1_macro": f1_macro,
    "auroc_macro": auroc_macro,
    "sensitivity_at_90_specificity": sensitivity_at_90_specificity,
    "ece": ece,
    "worst_group_accuracy": worst_group_accuracy,
}


def confusion(sample: Sample) -> NDArray[np.int64]:
    """Counts (K, K): rows are true classes, columns predicted ones."""
    cells = sample.labels * sample.n_classes + sample.predicted
    return np.bincount(cells, minlength=sample.n_classes**2).reshape(sample.n_classes, sample.n_classes)
