"""Bootstrap over groups: whole patients, lesions or near-duplicate clusters are drawn, never single images of one."""

from collections.abc import Iterable, Iterator

import numpy as np

from medmask.evaluation.metrics import METRICS, Array, Sample

CHUNK_CELLS = 2_500_000  # weights held at a time, about 20 MB


def group_weights(groups: Iterable[str], draws: int, seed: int = 0) -> Iterator[Array]:
    """Yield weights (b, N), in all `draws` rows: how often each image is in a draw of its groups with replacement.

    The counts depend on the seed and the set of groups alone, so two networks that are judged on the same groups
    get the same draws, in whatever order their images stand: that makes differences between them paired.
    """
    _, index = np.unique(np.asarray(list(groups), dtype=str), return_inverse=True)
    n_groups = int(index.max()) + 1
    rng = np.random.default_rng([seed, n_groups])
    chunk = max(1, CHUNK_CELLS // len(index))
    for start in range(0, draws, chunk):
        rows = min(chunk, draws - start)
        picks = rng.integers(n_groups, size=(rows, n_groups)) + n_groups * np.arange(rows)[:, None]
        counts = np.bincount(picks.ravel(), minlength=rows * n_groups).reshape(rows, n_groups)
        yield counts[:, index].astype(float)


def bootstrap(sample: Sample, groups: Iterable[str], names: Iterable[str], *, draws: int = 2000) -> dict[str, Array]:
    """Draws of several metrics over the same resampled groups.

    Parameters
    ----------
    groups : N names; images with equal names are drawn together.
    names : metrics that are defined for this sample.

    Returns
    -------
    dict of ndarray, (draws,). NaN where a draw has lost the classes that a metric needs, and everywhere for a single
    group, which cannot vary.
    """
    groups = list(groups)
    if len(set(groups)) < 2:
        return {name: np.full(draws, np.nan) for name in names}
    wanted = {name: METRICS[name] for name in names}
    parts = [
        {metric: metric(sample, weights) for metric in set(wanted.values())} for weights in group_weights(groups, draws)
    ]
    return {name: np.concatenate([part[metric] for part in parts]) for name, metric in wanted.items()}


def interval(values: Array, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap draws, undefined draws left out; NaN twice when all are undefined."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return np.nan, np.nan
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
