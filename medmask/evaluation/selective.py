"""Selective classification: answer only where the confidence is high enough, and count the errors among the answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from medmask.evaluation.metrics import Array


def combine(first: Array, second: Array) -> Array:
    """Scores (N, K) of two networks together: softmax of the product of their probabilities.

    Source: aliasgharkhani/Masktune, the network before and after masking.
    """
    product = np.exp(first * second)
    return product / product.sum(axis=1, keepdims=True)


def select(scores: Array, labels: np.ndarray, validation: Array, coverages: Sequence[float]) -> list[dict[str, Any]]:
    """Coverage and error at thresholds that answer a given share of the validation images.

    Parameters
    ----------
    scores : (N, K), of the test images. labels : (N,), their true classes.
    validation : (M, K), scores of the validation images; labels are not needed.
    coverages : shares in (0, 1].

    Returns
    -------
    list, one a coverage: `wanted`, `threshold`, `coverage` (share of the test images answered), `n` and `error` of the
    answered ones, null without any. Differs from the source, whose threshold lies one image lower: a quantile.
    """
    confidence, correct = scores.max(axis=1), scores.argmax(axis=1) == labels
    rows = []
    for wanted in coverages:
        threshold = float(np.quantile(validation.max(axis=1), 1 - wanted))
        answered = confidence >= threshold
        n = int(answered.sum())
        rows.append({
            "wanted": wanted, "threshold": threshold, "coverage": n / len(labels), "n": n,
            "error": float(1 - correct[answered].mean()) if n else None,
        })  # fmt: skip
    return rows
