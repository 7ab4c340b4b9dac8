import numpy as np
import pytest
from scipy import stats

from medmask.evaluation.statistics import estimate, holm, paired_difference, prediction_interval, two_level


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.5
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])  # never below an earlier one, never above 1
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_one_seed_varies_by_groups_alone():
    draws = np.random.default_rng(0).normal(size=(1, 100))
    assert (two_level(draws) == draws[0]).all()


def test_two_levels_add_their_variances():
    rng = np.random.default_rng(0)
    seeds, groups = rng.normal(scale=3.0, size=(5, 1)), rng.normal(scale=2.0, size=(1, 40_000))
    mixed = two_level(seeds + groups)  # the group draw is common to all seeds, so it does not average out
    assert mixed.var() == pytest.approx(seeds.var() / 5 + 4.0, rel=0.03)


def test_estimate_by_hand():
    draws = np.tile(np.linspace(0.4, 0.6, 101), (2, 1))
    found = estimate([0.4, 0.6], draws)
    assert (found.value, found.n_seeds) == (pytest.approx(0.5), 2)
    assert found.sd == pytest.approx(np.sqrt(0.02))
    assert (found.low, found.high) == (pytest.approx(0.405), pytest.approx(0.595))
    alone = estimate([0.5], draws[:1])
    assert alone.sd is None
    assert alone.low == pytest.approx(0.405)
    assert estimate([0.5], np.full((1, 10), np.nan)).low is None


def test_what_two_networks_share_cancels():
    rng = np.random.default_rng(0)
    shared = rng.normal(scale=5.0, size=(3, 999)) + rng.normal(scale=5.0, size=(3, 1))
    found = paired_difference([1.0, 2.0, 3.0], [0.5, 1.5, 2.5], shared + 0.5, shared)
    assert (found.value, found.sd) == (0.5, 0.0)
    assert (found.low, found.high) == (pytest.approx(0.5), pytest.approx(0.5))
    assert found.p_value == pytest.approx(2 / 1000)  # no draw on the other side


def test_p_value_by_hand():
    draws = np.array([[-1.0] * 4 + [1.0] * 95])
    assert paired_difference([1.0], [0.0], draws, np.zeros((1, 99))).p_value == pytest.approx(2 * 5 / 100)
    assert paired_difference([0.0], [0.0], np.zeros((1, 99)), np.zeros((1, 99))).p_value == 1.0
    undefined = paired_difference([1.0], [0.0], np.full((1, 9), np.nan), np.zeros((1, 9)))
    assert (undefined.value, undefined.low, undefined.p_value) == (1.0, None, None)


def test_prediction_interval_by_hand():
    low, high = prediction_interval(0.8, 0.02, 5, 400)
    half = np.hypot(2.776445 * 0.02 * np.sqrt(1.2), 1.959964 * np.sqrt(0.16 / 400))
    assert (low, high) == (pytest.approx(0.8 - half, abs=1e-6), pytest.approx(0.8 + half, abs=1e-6))


def test_prediction_interval_covers_a_further_run():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        seeds = rng.normal(0.7, 0.02, size=4)
        low, high = prediction_interval(seeds.mean(), seeds.std(ddof=1), 4, 500)
        inside += low <= rng.binomial(500, rng.normal(0.7, 0.02)) / 500 <= high
    assert 0.93 < inside / 2000 < 0.99
    assert stats.binomtest(inside, 2000, 0.9).pvalue < 0.01
