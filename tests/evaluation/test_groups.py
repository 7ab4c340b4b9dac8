"""Accuracy by class and cue, over test sets."""

from types import SimpleNamespace

from medmask.evaluation.cells import Measure
from medmask.evaluation.groups import group_grids, group_notes

MEASURE = Measure("worst_group_accuracy", "bias_conflicting", "last")


def group(name, has_cue, accuracy):
    return {"class": name, "has_cue": has_cue, "n": 9, "accuracy": accuracy}


def cell(name, *seeds):
    """A cell whose seeds have (a, a with the cue, b, b with the cue)."""
    runs = []
    for a, a_cue, b, b_cue in seeds:
        raw = {"per_group": [group("a", False, a), group("b", False, b)]}
        conflicting = {"per_group": [group("a", False, a), group("b", True, b_cue)]}
        aligned = {"per_group": [group("a", True, a_cue), group("b", False, b)]}
        runs.append(SimpleNamespace(metrics={"last": {"raw": raw, "x": conflicting, "y": aligned}, "best": {}}))
    return SimpleNamespace(name=name, finished=runs)


def test_the_worst_group_is_that_of_each_seed():
    cells = [cell("erm", (0.2, 0.9, 0.8, 0.6), (0.8, 0.9, 0.8, 0.4)), cell("one", (1.0, 0.0, 0.5, 1.0)), cell("none")]
    (grid,) = group_grids(cells, MEASURE, 2)
    assert grid.header == ["", "a", "a, cue", "b", "b, cue", "worst of these"]
    assert grid.rows == [
        ["erm", "0.50 ± 0.42", "0.90 ± 0.00", "0.80 ± 0.00", "0.50 ± 0.14", "0.30 ± 0.14"],
        ["one", "1.00", "0.00", "0.50", "1.00", "0.00"],
    ]
    assert len(group_notes(cells, MEASURE)) == 1


def test_without_cues_there_is_no_table():
    plain = SimpleNamespace(metrics={"last": {"test": {"metrics": {}}}})
    assert group_grids([SimpleNamespace(name="erm", finished=[plain])], MEASURE, 2) == []
    assert group_notes([SimpleNamespace(name="erm", finished=[plain])], MEASURE) == []
