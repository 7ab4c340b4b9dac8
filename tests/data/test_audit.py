"""Folds of the training images, and labels that are probably wrong."""

import sys

import numpy as np
import pandas as pd
import pytest

from medmask.data.audit import assign_folds, describe_search, find_errors, judge_search
from medmask.errors import ConfigError, DataError

CLASSES = ["a", "b", "c"]


def images(n: int = 120, each: int = 2, seed: int = 0) -> tuple[np.ndarray, pd.Series]:
    """Labels of 60, 30 and 10 percent of the groups, most groups of several images with one wrong label in ten."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n // each), each)
    labels = rng.choice(3, size=n // each, p=[0.6, 0.3, 0.1])[groups]
    wrong = rng.random(n) < 0.1
    labels[wrong] = rng.integers(3, size=wrong.sum())
    return labels, pd.Series(groups).map("lesion{}".format)


@pytest.mark.parametrize("each", [1, 2, 4])
@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_cover_keep_groups_whole_and_are_alike(folds, each):
    labels, groups = images(240, each)
    found = assign_folds(labels, groups, folds, 0, CLASSES)
    assert set(found) == set(range(folds))  # each image is in one fold by construction
    assert pd.Series(found).groupby(groups).nunique().max() == 1
    sizes = np.bincount(found)
    assert sizes.max() - sizes.min() <= each
    for label in range(3):
        shares = np.bincount(found[labels == label], minlength=folds)
        assert shares.max() - shares.min() <= 2 + each, (label, shares)


def test_folds_follow_the_seed_and_nothing_else():
    labels, groups = images()
    first = assign_folds(labels, groups, 3, 0, CLASSES)
    assert (first == assign_folds(labels, groups, 3, 0, CLASSES)).all()
    assert (first != assign_folds(labels, groups, 3, 1, CLASSES)).any()


def test_every_given_label_needs_as_many_groups_as_folds():
    labels, groups = np.repeat([0, 1, 2], [8, 8, 2]), pd.Series([f"g{i}" for i in range(18)])
    with pytest.raises(DataError, match=r"folds: need at least 4 groups of images with each given label, got c 2"):
        assign_folds(labels, groups, 4, 0, CLASSES)
    assert set(assign_folds(labels[:16], groups[:16], 4, 0, CLASSES)) == {0, 1, 2, 3}  # a class without images is none
    groups[8:16] = "one"
    with pytest.raises(DataError, match=r"got b 1"):
        assign_folds(labels[:16], groups[:16], 4, 0, CLASSES)
    with pytest.raises(DataError, match=r"got no image at all"):
        assign_folds(labels[:0], groups[:0], 4, 0, CLASSES)


def test_a_class_without_labels_is_not_warned_of():
    labels = np.array([0, 0, 0, 2, 2])
    probs = np.eye(4)[labels] * 0.8 + 0.05
    assert find_errors(labels, probs)[2] == []
    assert "too few examples" in find_errors(np.append(labels, 3), np.eye(4)[[0, 0, 0, 2, 2, 0]] * 0.8 + 0.05)[2][0]


# 0.9 for one's own class, but for image 3, labelled 0 and predicted 1, and image 7, labelled 1 and predicted 0
LABELS = np.repeat([0, 1], 4)
PROBS = np.array([[0.9, 0.1]] * 3 + [[0.1, 0.9]] + [[0.1, 0.9]] * 3 + [[0.9, 0.1]])


def test_confident_learning_by_hand():
    """Thresholds: the mean probability of a class over its own, (3 * 0.9 + 0.1) / 4 = 0.7. Above it are, of the label
    0, three images for 0 and one for 1, and the same of the label 1: two off the diagonal, images 3 and 7."""
    pytest.importorskip("cleanlab", reason="pip install 'medmask[cleanlab]'")
    found, quality, said = find_errors(LABELS, PROBS)
    assert np.flatnonzero(found).tolist() == [3, 7]
    assert quality.tolist() == pytest.approx([0.9, 0.9, 0.9, 0.1] * 2)
    assert said == []


def test_nothing_is_found_where_all_agree():
    pytest.importorskip("cleanlab", reason="pip install 'medmask[cleanlab]'")
    found, _, _ = find_errors(LABELS, np.eye(2)[LABELS] * 0.8 + 0.1)
    assert not found.any()
    assert describe_search(judge_search(found, LABELS == 2)) == "none of 8 labels is probably wrong"


def test_what_cannot_be_judged_is_refused():
    pytest.importorskip("cleanlab", reason="pip install 'medmask[cleanlab]'")
    with pytest.raises(DataError, match="all given labels are of one class"):
        find_errors(LABELS * 0, PROBS)
    broken = PROBS.copy()
    broken[0] = np.nan
    with pytest.raises(DataError, match="a network predicts NaN"):
        find_errors(LABELS, broken)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(ConfigError, match=r"audit: .*pip install 'medmask\[cleanlab\]'"):
        find_errors(LABELS, PROBS)


def test_precision_and_recall_by_hand():
    found, flipped = np.array([1, 1, 1, 0, 0], dtype=bool), np.array([1, 1, 0, 1, 0], dtype=bool)
    facts = judge_search(found, flipped)
    assert facts == {
        "judged": 5, "found": 3, "flipped": 3, "found_flipped": 2, "precision": 2 / 3, "recall": 2 / 3
    }  # fmt: skip
    assert describe_search(facts) == (
        "3 of 5 labels are probably wrong (2 of them among the 3 flipped ones, precision 0.667, recall 0.667)"
    )
    assert describe_search(judge_search(found, flipped & False)) == "3 of 5 labels are probably wrong"
    assert judge_search(found & False, flipped)["precision"] is None
