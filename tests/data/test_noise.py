"""Label noise: exact counts, uniform targets, known transition matrices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chisquare

from medmask.data.noise import (
    count_flips,
    count_transitions,
    describe_noise,
    draw_transition,
    flip_symmetric,
    transition_matrix,
)


@pytest.mark.parametrize(
    ("n", "rate", "flips"),
    [
        (5000, 0.2, 1000),
        (5000, 0.4, 2000),
        (1258, 0.4, 503),
        (269, 0.4, 107),
        (100, 0.29, 29),
        (7, 1.0, 7),
        (9, 0.1, 0),
    ],
)
def test_count_flips(n, rate, flips):
    assert count_flips(n, rate) == flips


@given(
    st.lists(st.sampled_from([0, 2, 3, 7]), min_size=1, max_size=200),
    st.floats(0, 1),
    st.integers(0, 2**32),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_exactly_so_many_labels_move_to_targets(labels, rate, seed, every_class):
    labels = np.array(labels)
    targets = np.arange(9) if every_class else np.array([7, 0, 3, 2])
    flips = count_flips(len(labels), rate)
    noisy = flip_symmetric(labels, flips, targets, np.random.default_rng(seed))
    assert (noisy != labels).sum() == flips
    assert np.isin(noisy, targets).all()


def test_rows_and_targets_are_uniform():
    labels = np.repeat(np.arange(4), 5000)
    noisy = flip_symmetric(labels, 8000, np.arange(5), np.random.default_rng(1))
    counts = count_transitions(labels, noisy, 5)
    assert chisquare(5000 - np.diag(counts)[:4]).pvalue > 1e-4
    for label in range(4):
        assert chisquare(np.delete(counts[label], label)).pvalue > 1e-4


def test_transitions_by_hand():
    true, noisy = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 1, 0])
    counts = count_transitions(true, noisy, 3)
    assert counts.tolist() == [[2, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert transition_matrix(counts) == [[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], None]
    assert describe_noise(true, noisy, 3)["flipped"] == 3
    assert describe_noise(true, noisy, 3)["rate"] == 0.5
    assert describe_noise(true[:0], noisy[:0], 3)["rate"] == 0.0


def test_figure(tmp_path):
    sides = {
        "train": describe_noise(np.array([0, 1]), np.array([0, 0]), 3),
        "val": describe_noise(np.array([], int), np.array([], int), 3),
    }
    draw_transition(tmp_path / "figure.png", ["cats $5", "dogs $", "_^{"], sides)
    assert min(Image.open(tmp_path / "figure.png").size) > 400
