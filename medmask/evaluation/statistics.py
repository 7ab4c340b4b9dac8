"""Statistics over seeds and groups: two-level intervals, paired differences, Holm, prediction intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from medmask.evaluation.bootstrap import interval
from medmask.evaluation.metrics import Array


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its spread; `sd` is None for one seed, the bounds are None for a single group."""

    value: float
    sd: float | None
    low: float | None
    high: float | None
    n_seeds: int
    p_value: float | None = None  # of no difference; only for differences


def two_level(draws: Array, seed: int = 0) -> Array:
    """Draws of the mean over seeds when seeds and groups are both drawn with replacement.

    Parameters
    ----------
    draws : ndarray, (S, B). Row s holds the metric of seed s over B draws of the groups; column b of every row is
        the same draw of the groups.

    Returns
    -------
    ndarray, (B,). With one seed its own row: only the groups vary.
    """
    n_seeds, n_draws = draws.shape
    picks = np.random.default_rng([seed, n_seeds]).integers(n_seeds, size=(n_seeds, n_draws))
    return np.take_along_axis(draws, picks, axis=0).mean(axis=0)


def estimate(values: Sequence[float], draws: Array) -> Estimate:
    """Mean over seeds, its sd, and its two-level 95 % interval.

    Parameters
    ----------
    values : S numbers, one a seed.
    draws : ndarray, (S, B), as for `two_level`.
    """
    mixed = two_level(draws)
    low, high = interval(mixed)
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    bounds = (None, None) if np.isnan(low) else (low, high)
    return Estimate(float(np.mean(values)), sd, bounds[0], bounds[1], len(values))


def paired_difference(a: Sequence[float], b: Sequence[float], draws_a: Array, draws_b: Array) -> Estimate:
    """Mean of a minus b over seeds, its two-level 95 % interval, and the p-value of no difference.

    Row s of everything is the same seed, column b of the draws the same groups, so what the two share cancels.
    The p-value is twice the share of draws on the far side of zero, with one draw added to each side so that it is
    never zero.
    """
    differences = np.asarray(a) - np.asarray(b)
    draws = draws_a - draws_b
    mixed = two_level(draws)
    low, high = interval(mixed)
    sd = float(np.std(differences, ddof=1)) if len(differences) > 1 else None
    mixed = mixed[~np.isnan(mixed)]
    if not len(mixed):
        return Estimate(float(differences.mean()), sd, None, None, len(differences))
    tail = min(int((mixed <= 0).sum()), int((mixed >= 0).sum()))
    p_value = min(1.0, 2 * (tail + 1) / (len(mixed) + 1))
    return Estimate(float(differences.mean()), sd, low, high, len(differences), p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold for all comparisons of a table together, in the given order."""
    order = np.argsort(p_values, kind="stable")
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, position in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        corrected[position] = largest
    return corrected


def prediction_interval(mean: float, sd: float, n_seeds: int, n_published: int) -> tuple[float, float]:
    """95 % interval for one further run that is judged on `n_published` images.

    Two independent parts: a new seed against the mean of `n_seeds` (Student t), and the binomial error of a share
    in `n_published` images (normal). For metrics other than accuracy the second part is an approximation.
    """
    seed_part = stats.t.ppf(0.975, n_seeds - 1) * sd * np.sqrt(1 + 1 / n_seeds)
    image_part = stats.norm.ppf(0.975) * np.sqrt(max(mean * (1 - mean), 0.0) / n_published)
    half = float(np.hypot(seed_part, image_part))
    return mean - half, mean + half


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rho, equal values with their mean rank; None where one side is the same everywhere."""
    if len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return float(stats.spearmanr(a, b).statistic)
