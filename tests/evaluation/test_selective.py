"""Selective classification by hand."""

import numpy as np
import pytest

from medmask.evaluation.selective import combine, select


def test_combined_scores():
    found = combine(np.array([[0.8, 0.2]]), np.array([[0.6, 0.4]]))
    assert found[0] == pytest.approx([0.599, 0.401], abs=1e-3)


def test_coverage_and_error():
    confidence = np.array([0.95, 0.9, 0.8, 0.7, 0.6])
    scores = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.array([0, 0, 1, 0, 1])
    rows = select(scores, labels, scores, [1.0, 0.5, 0.25])
    assert [row["n"] for row in rows] == [5, 3, 2]
    assert [row["coverage"] for row in rows] == pytest.approx([1, 0.6, 0.4])
    assert [row["error"] for row in rows] == pytest.approx([0.4, 1 / 3, 0])
    assert rows[1]["threshold"] == 0.8


def test_nothing_answered():
    (row,) = select(np.array([[0.6, 0.4]]), np.array([0]), np.array([[0.9, 0.1]]), [1.0])
    assert (row["n"], row["coverage"], row["error"]) == (0, 0, None)
