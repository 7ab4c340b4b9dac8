import json

import numpy as np
import pytest

from medmask.evaluation.metrics import METRICS, Sample, value
from medmask.evaluation.scores import constant_scores, score_test_set


def test_constants_by_hand():
    labels = np.array([0] * 6 + [1] * 3 + [2] * 1)  # class 3 has no image
    found = constant_scores(labels, 4)
    assert found["majority"]["accuracy"] == pytest.approx(0.6)
    assert found["majority"]["balanced_accuracy"] == pytest.approx(1 / 3)
    assert found["majority"]["precision_macro"] == pytest.approx(0.2)
    assert found["majority"]["f1_macro"] == pytest.approx(2 * 0.6 / 1.6 / 3)
    assert found["majority"]["auroc_macro"] == 0.5
    assert found["stratified"]["accuracy"] == pytest.approx(0.36 + 0.09 + 0.01)
    assert found["stratified"]["balanced_accuracy"] == pytest.approx(1 / 3)
    assert found["majority"]["ece"] is None  # ten images are too few
    assert found["stratified"]["worst_group_accuracy"] is None


def test_the_guess_is_what_guessing_gives():
    rng = np.random.default_rng(0)
    labels = rng.choice(3, size=20_000, p=[0.6, 0.3, 0.1])
    cue = rng.random(20_000) < 0.5
    guess = Sample(labels, np.eye(3)[rng.permutation(labels)], cue)
    found = constant_scores(labels, 3, cue)["stratified"]
    for name, expected in found.items():
        if expected is not None:
            assert value(name, guess) == pytest.approx(expected, abs=0.02), name


def test_an_absent_class_is_named_and_nothing_is_nan():
    labels = np.array([0, 0, 1, 1, 1, 0])
    probs = np.eye(3)[[0, 2, 1, 1, 0, 0]] * 0.8 + 0.2 / 3
    found = score_test_set(Sample(labels, probs), list("aabbcc"), ["x", "y", "z"], draws=100)
    json.dumps(found, allow_nan=False)
    assert (found["n"], found["n_groups"], found["absent"]) == (6, 3, ["z"])
    assert found["per_class"]["z"] == {"n": 0, "recall": None, "precision": 0.0, "f1": None, "auroc": None}
    assert found["per_class"]["x"]["recall"] == pytest.approx(2 / 3)
    assert found["confusion"] == [[2, 0, 1], [1, 2, 0], [0, 0, 0]]
    assert set(found["metrics"]) == set(METRICS)
    assert found["metrics"]["auroc_macro"]["n_classes"] == 2
    accuracy = found["metrics"]["accuracy"]
    assert accuracy["value"] == pytest.approx(4 / 6)
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert found["metrics"]["ece"] == {
        "value": None, "low": None, "high": None, "why": "needs more than 500 images, got 6",
    }  # fmt: skip


def test_one_group_and_one_class_do_not_crash():
    found = score_test_set(Sample(np.zeros(2, dtype=int), np.eye(2)), ["a", "a"], ["x", "y"], draws=10)
    assert found["metrics"]["accuracy"] == {"value": 0.5, "low": None, "high": None}
    assert found["metrics"]["auroc_macro"]["why"] == "needs two classes with images, got 1"


def test_bins_of_the_calibration_error_are_kept():
    rng = np.random.default_rng(0)
    sample = Sample(rng.integers(2, size=600), rng.dirichlet([1, 1], size=600))
    entry = score_test_set(sample, [str(i) for i in range(600)], ["x", "y"], draws=20)["metrics"]["ece"]
    assert len(entry["bins"]) == 15
    assert sum(b["n"] for b in entry["bins"]) == 600
    again = sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in entry["bins"] if b["n"]) / 600
    assert entry["value"] == pytest.approx(again)


def test_groups_by_hand():
    labels = np.array([0, 0, 0, 1, 1])
    cue = np.array([False, True, True, True, True])
    probs = np.eye(2)[[0, 0, 1, 0, 0]] * 0.8 + 0.1
    found = score_test_set(Sample(labels, probs, cue), list("abcde"), ["x", "y"], draws=100)
    assert found["per_group"] == [
        {"class": "x", "has_cue": False, "n": 1, "accuracy": 1.0},
        {"class": "x", "has_cue": True, "n": 2, "accuracy": 0.5},
        {"class": "y", "has_cue": True, "n": 2, "accuracy": 0.0},
    ]
    assert found["metrics"]["worst_group_accuracy"]["value"] == 0
    assert "per_group" not in score_test_set(Sample(labels, probs), list("abcde"), ["x", "y"], draws=100)
