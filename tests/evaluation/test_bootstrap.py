import numpy as np
import pytest

from medmask.evaluation.bootstrap import bootstrap, group_weights, interval
from medmask.evaluation.metrics import METRICS, Sample


def stack(groups, draws=50, seed=0):
    return np.concatenate(list(group_weights(groups, draws, seed)))


def coin(n: int, share: float) -> Sample:
    """A sample with accuracy `share`."""
    right = np.arange(n) < share * n
    return Sample(np.zeros(n, dtype=int), np.eye(2)[np.where(right, 0, 1)])


def test_images_of_a_group_are_drawn_together():
    weights = stack(["a", "b", "a", "c", "b"])
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()  # as many groups drawn as there are
    assert len(np.unique(weights[:, 0])) > 1


def test_draws_follow_groups_and_not_the_order_of_images():
    weights = stack(["a", "b", "c", "a"])
    assert (stack(["c", "a", "a", "b"]) == weights[:, [2, 0, 3, 1]]).all()
    assert (stack(["a", "b", "c", "a"]) == weights).all()


def test_chunks_change_nothing(monkeypatch):
    whole = stack(["a", "b", "c", "d"], draws=40)
    monkeypatch.setattr("medmask.evaluation.bootstrap.CHUNK_CELLS", 28)
    parts = list(group_weights(["a", "b", "c", "d"], 40))
    assert [len(part) for part in parts] == [7, 7, 7, 7, 7, 5]
    assert (np.concatenate(parts) == whole).all()


def test_spread_is_that_of_the_groups():
    single = bootstrap(coin(400, 0.75), [str(i) for i in range(400)], ["accuracy"], draws=4000)["accuracy"]
    assert single.mean() == pytest.approx(0.75, abs=0.003)
    assert single.std() == pytest.approx(np.sqrt(0.75 * 0.25 / 400), rel=0.06)
    four = bootstrap(coin(400, 0.75), [str(i // 4) for i in range(400)], ["accuracy"], draws=4000)["accuracy"]
    assert four.std() == pytest.approx(np.sqrt(0.75 * 0.25 / 100), rel=0.06)  # 100 groups of four alike


def test_a_draw_equals_the_metric_of_the_repeated_images():
    rng = np.random.default_rng(0)
    sample = Sample(rng.integers(3, size=40), rng.dirichlet(np.ones(3), size=40))
    groups = [str(i) for i in range(40)]
    found = bootstrap(sample, groups, ["auroc_macro", "f1_macro"], draws=5)
    for b, weights in enumerate(stack(groups, draws=5)):
        index = np.repeat(np.arange(40), weights.astype(int))
        again = Sample(sample.labels[index], sample.probs[index])
        for name in found:
            assert found[name][b] == pytest.approx(METRICS[name](again, np.ones((1, 40)))[0])


def test_undefined_draws_are_left_out_of_the_interval():
    labels = np.array([0] * 9 + [1])  # about a third of the draws lose the only image of class 1
    probs = np.stack([1 - np.arange(10) / 10, np.arange(10) / 10], axis=1)
    draws = bootstrap(Sample(labels, probs), list("abcdefghij"), ["auroc_macro"], draws=300)["auroc_macro"]
    assert 0.2 < np.isnan(draws).mean() < 0.5
    assert interval(draws) == (1.0, 1.0)


def test_a_single_group_has_no_interval():
    draws = bootstrap(coin(5, 0.6), ["a"] * 5, ["accuracy"], draws=10)["accuracy"]
    assert np.isnan(draws).all()
    assert np.isnan(interval(draws)).all()


def test_interval_by_hand():
    assert interval(np.array([*np.arange(101.0), np.nan])) == pytest.approx((2.5, 97.5))
