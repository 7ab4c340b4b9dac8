"""What was learnt of wrong labels, from histories."""

from types import SimpleNamespace

from medmask.evaluation.learnt import learnt_grids, learnt_notes
from medmask.evaluation.tables import DASH


def cell(name, *histories, method="reweight"):
    settings = {"finetune": {"method": method}}
    runs = [
        SimpleNamespace(history=lambda stage, lines=lines: lines if stage == "finetune" else [], settings=settings)
        for lines in histories
    ]
    return SimpleNamespace(name=name, finished=runs)


def epoch(**numbers):
    return {f"train/{name}": value for name, value in numbers.items()}


def test_the_last_epoch_of_each_seed_counts():
    weighed = [
        {"loss/total": 1.0},
        epoch(auroc_weight=0.2, flipped_as_given=0.9),
        epoch(auroc_weight=0.7, flipped_as_given=0.1),
    ]
    cells = [
        cell("clamp", weighed, [epoch(auroc_weight=0.9, flipped_as_given=0.3), {"loss/total": 0.1}]),
        cell("erm", [epoch(flipped_as_given=0.5)]),
        cell("no flips", [{"loss/total": 1.0}]),
        cell("none finished"),
    ]
    (grid,) = learnt_grids(cells, 2)
    assert grid.header == ["", "AUROC of weights", "flipped: classified as labelled"]
    assert grid.rows == [["clamp", "0.80 ± 0.14", "0.20 ± 0.14"], ["erm", DASH, "0.50"]]
    (note,) = learnt_notes(cells)
    assert "AUROC: " in note
    assert "Classified: " in note
    assert "Mended: " not in note  # there is no such column
    assert "confident" not in note
    assert "confident" in learnt_notes([*cells, cell("cl", [epoch(flipped_as_given=0.5)], method="confident")])[0]


def test_without_flips_there_is_no_table():
    cells = [cell("erm", [{"loss/total": 1.0}])]
    assert (learnt_grids(cells, 2), learnt_notes(cells)) == ([], [])
