"""Coverages of an experiment: read from its evaluations, put into a table and a figure."""

import json
import re

import pytest
from PIL import Image

from medmask.evaluation.cells import Measure, make_cells, measure_cells
from medmask.evaluation.collect import read_runs
from medmask.evaluation.coverage import coverage_grids, coverage_notes, find_answers
from medmask.evaluation.coverage_figure import choose_lines, coverage_figure
from medmask.evaluation.figures import save
from tests.evaluation.fake_results import make_results

MEASURE = Measure("balanced_accuracy", "test", "last")
WANTED = (1.0, 0.5)  # in another order than that of the table


def add_coverages(path):
    """Write into each evaluation what the stage does: the error falls with the coverage, and differs by seed."""
    for metrics in (path.parents[2] / "evaluate").glob("*/metrics.json"):
        content = json.loads(metrics.read_text())
        seed, reweight = int(metrics.parent.name[-1]), "reweight" in metrics.parent.name
        rows = [
            {"wanted": w, "threshold": 0.5, "coverage": w - 0.1 * seed, "n": 30, "error": 0.4 * w + 0.1 * seed}
            for w in WANTED
        ]
        if reweight:
            rows[1] |= {"coverage": 0.0, "n": 0, "error": None}
        content["selective"] = {"test": rows, "other": rows}
        metrics.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = make_results(tmp_path_factory.mktemp("fake"), n=60, seeds=(0, 1), draws=100)
    add_coverages(path)
    return read_runs(path)[1]


@pytest.fixture(scope="module")
def cells(runs):
    made = make_cells(runs, "noise")
    measure_cells(made, MEASURE, 100)
    return made


def test_answers_of_a_cell_by_hand(cells):
    half, whole = find_answers(cells[0], "test")
    assert (half.wanted, half.n_seeds, whole.wanted) == (0.5, 2, 1.0)
    assert half.points == [(0.5, 0.2), (pytest.approx(0.4), pytest.approx(0.3))]
    assert half.mean == pytest.approx((0.45, 0.25))
    assert find_answers(cells[0], "elsewhere") == []


def test_table_has_error_spread_and_share_of_each_coverage(cells):
    (grid,) = coverage_grids(cells, MEASURE, 3)
    assert grid.header == ["", "50 % wanted", "100 % wanted"]
    rows = {row[0]: row[1:] for row in grid.rows}
    assert rows["Baseline, noise none"] == ["0.250 ± 0.071 (45.0 %)", "0.450 ± 0.071 (95.0 %)"]
    assert rows["Reweighting (weights clamp), noise sym20"][0] == "nothing answered"
    assert rows["Reweighting (weights sigmoid), noise sym40"][1] == "0.400 (100.0 %)"  # one of two seeds has failed
    (note,) = coverage_notes(cells, MEASURE)
    assert "test set test" in note


def test_seeds_that_answer_nothing_are_counted(runs, monkeypatch):
    made = make_cells([run for run in runs if run["row"] == "baseline" and run["noise"] == "none"], None)
    rows = made[0].runs[1].metrics["selective"]["test"]
    monkeypatch.setitem(rows[1], "error", None)
    assert coverage_grids(made, MEASURE, 2)[0].rows == [
        ["Baseline", "0.20 (50.0 %, 1 of 2 seeds answer nothing)", "0.45 ± 0.07 (95.0 %)"]
    ]


def test_without_coverages_there_is_nothing(tmp_path):
    made = make_cells(read_runs(make_results(tmp_path, n=40, seeds=(0,), draws=100))[1], None)
    assert coverage_grids(made, MEASURE, 3) == coverage_notes(made, MEASURE) == []
    assert coverage_figure(made, MEASURE, None).texts[0].get_text() == "No evaluation here has coverages"


def test_figure_has_a_panel_a_test_set_and_column(cells, tmp_path):
    figure = coverage_figure(cells, MEASURE, "baseline")
    named = [f"noise {noise}, {name}" for noise in ("none", "sym20", "sym40") for name in ("test", "other")]
    assert [axes.get_title() for axes in figure.axes] == named
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_linestyle() != "None"]
    assert curves[0].get_xdata() == pytest.approx([0.45, 0.95])
    assert curves[0].get_ydata() == pytest.approx([0.25, 0.45])
    assert len({line.get_color() for line in curves}) == len(curves) == 2  # reweighting is not planned without noise
    save(figure, tmp_path / "c.png", tmp_path / "c.svg")
    with Image.open(tmp_path / "c.png") as image:
        assert min(image.size) > 600


def test_of_many_rows_the_reference_and_the_best_are_drawn(runs, monkeypatch):
    made = make_cells(runs, None)
    for k, cell in enumerate(made):
        for run in cell.finished:
            for row in run.metrics["selective"]["test"]:
                monkeypatch.setitem(row, "error", 1 - 0.05 * k)
    chosen, n = choose_lines(made, "test", "baseline")
    names = [cell.line for cell in made]
    assert n == 10
    assert list(chosen) == [*names[:3], *names[5:]]  # the reference is worst, and stays
    figure = coverage_figure(made, MEASURE, "baseline")
    assert re.fullmatch(r"8 of 10 rows: the reference and the smallest errors", figure.get_suptitle())


def test_a_row_that_has_not_finished_leaves_its_panel_alone(runs):
    made = make_cells(runs, "noise")
    for run in made[0].runs:
        run.metrics, run.reason = None, "finetune: failed"
    figure = coverage_figure(made, MEASURE, "baseline")
    assert all(axes.get_xlim()[1] <= 1.2 and len(axes.get_yticks()) > 2 for axes in figure.axes)
    assert not any("o" in [text.get_text() for text in axes.get_xticklabels()] for axes in figure.axes)
