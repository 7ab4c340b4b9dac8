"""Label noise: exact numbers of flipped labels, and the transition matrix that results."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np


def count_flips(n: int, rate: float) -> int:
    """floor(n * rate), the rate taken as the decimal it is written as: 29 of 100 at 0.29, where floats give 28."""
    return math.floor(n * Fraction(str(rate)))


def flip_symmetric(labels: np.ndarray, n_flips: int, targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move exactly `n_flips` labels, each to another class.

    Parameters
    ----------
    labels : ndarray, (N,), int64.
    n_flips : at most N. Which labels is drawn uniformly, without replacement.
    targets : ndarray, (T,), int64, distinct, T >= 2. Classes that a label can move to, each as likely as the others;
        every label is among them.
    rng : numpy.random.Generator

    Returns
    -------
    ndarray, (N,), int64. Differs from `labels` in exactly `n_flips` places.

    Source: github.com/Cute77/learning-to-reweight-examples. Differs: seeded, draws which labels instead of taking the
    first of a shuffled file.
    """
    rows = rng.choice(len(labels), size=n_flips, replace=False)
    targets = np.sort(targets)
    own = np.searchsorted(targets, labels[rows])
    step = rng.integers(1, len(targets), size=n_flips)  # 1..T-1 places on, round the end: never the own class
    flipped = labels.copy()
    flipped[rows] = targets[(own + step) % len(targets)]
    return flipped


def count_transitions(true: np.ndarray, noisy: np.ndarray, n_classes: int) -> np.ndarray:
    """(K, K) int64; entry [i, j] counts the labels of true class i that are now j."""
    return np.bincount(true * n_classes + noisy, minlength=n_classes**2).reshape(n_classes, n_classes)


def transition_matrix(counts: np.ndarray) -> list[list[float] | None]:
    """Rows of T[i, j] = P(noisy = j | true = i), None for a class without labels."""
    return [(row / row.sum()).tolist() if row.sum() else None for row in counts]


def describe_noise(true: np.ndarray, noisy: np.ndarray, n_classes: int) -> dict[str, Any]:
    """What transition.json holds of one side."""
    counts = count_transitions(true, noisy, n_classes)
    flipped = int((true != noisy).sum())
    return {
        "n": len(true),
        "flipped": flipped,
        "rate": flipped / len(true) if len(true) else 0.0,
        "matrix": transition_matrix(counts),
        "counts": counts.tolist(),
    }


def draw_transition(path: Path, classes: list[str], sides: dict[str, dict[str, Any]]) -> None:
    """PNG with one heat map a side that has images; rows are true classes, grey where a class has no images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {side: facts for side, facts in sides.items() if facts["n"]}
    side_length = max(3.5, 0.45 * len(classes) + 1.5)
    figure = Figure(figsize=(side_length * len(shown), side_length + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (side, facts) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        matrix = np.array([row or [np.nan] * len(classes) for row in facts["matrix"]])
        axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
        axes.set_facecolor("0.85")
        ticks, turn = range(len(classes)), 90 if max(map(len, classes)) > 3 else 0
        axes.set_xticks(ticks, classes, rotation=turn, parse_math=False)
        axes.set_yticks(ticks, classes, parse_math=False)
        axes.set_xlabel("label after noise")
        axes.set_ylabel("true class")
        axes.set_title(f"{side}: {facts['flipped']} of {facts['n']} labels flipped", fontsize=10)
        if len(classes) > 20:
            continue  # numbers would not be legible
        for (row, column), value in np.ndenumerate(matrix):
            if value > 0:
                text = f"{value:.2f}".removeprefix("0") if value < 1 else "1"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color="w" if value > 0.55 else "k")
    figure.savefig(path, dpi=150)
