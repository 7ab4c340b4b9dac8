from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medmask.evaluation import figures
from medmask.evaluation.cells import Measure, judge_published, make_cells, measure_cells
from medmask.evaluation.class_figure import classes_figure
from medmask.evaluation.collect import Run, read_runs
from medmask.evaluation.curves_figure import by_epoch, curves_figure
from tests.evaluation.fake_results import make_results

MEASURE = Measure("balanced_accuracy", "test", "last")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    content, runs = read_runs(make_results(tmp_path_factory.mktemp("fake"), n=60, seeds=(0, 1), draws=100))
    cells = make_cells(runs, "noise")
    measure_cells(cells, MEASURE, 100)
    judge_published(cells, content["settings"]["published"], MEASURE)
    return runs, cells


def test_all_are_written_and_svg_is_reproducible(experiment, tmp_path):
    runs, cells = experiment
    makers = {
        "metric": lambda: figures.metric_figure(cells, MEASURE),
        "confusion": lambda: figures.confusion_figure(cells, MEASURE),
        "curves": lambda: curves_figure(cells),
        "noise": lambda: figures.noise_figure(runs),
        "classes": lambda: classes_figure(cells, "last"),
    }
    for name, make in makers.items():
        figures.save(make(), tmp_path / f"{name}.png", tmp_path / f"{name}.svg")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 300
    figures.save(makers["metric"](), tmp_path / "again.png", tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "metric.svg").read_bytes()


def test_metric_figure_shows_means_and_published_numbers(experiment):
    _, cells = experiment
    axes = figures.metric_figure(cells, MEASURE).axes[0]
    drawn = [line.get_xdata()[0] for line in axes.lines]
    assert all(cell.main.value in drawn for cell in cells)
    assert 0.55 in drawn
    assert 0.73 not in drawn  # of other data
    assert axes.get_yticklabels()[0].get_text() == "Baseline"


def test_metric_figure_is_at_the_scale_of_the_results(experiment):
    _, cells = experiment
    far = [replace(cell, published={"value": 40.0, "not_comparable": "other images"}) for cell in cells]
    figure = figures.metric_figure(far, MEASURE)
    (axes,) = figure.axes
    values = [cell.main for cell in cells if cell.main]
    span = max(v.high for v in values) - min(v.low for v in values)
    assert axes.get_xlim()[1] - axes.get_xlim()[0] < 2.2 * span
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "published" not in names
    constants = [line for line in axes.collections if len(line.get_segments())]
    inside = axes.get_xlim()[0] <= constants[0].get_segments()[0][0][0] <= axes.get_xlim()[1]
    assert any("off the axis" in name for name in names) != inside


def test_at_most_twelve_confusion_panels(experiment):
    _, cells = experiment
    figure = figures.confusion_figure([*cells, *cells], MEASURE)
    assert len([axes for axes in figure.axes if axes.get_title()]) == 12
    assert figure.get_suptitle() == "first 12 of 20 cells"


def test_noise_panels_pool_the_seeds(experiment):
    runs, _ = experiment
    titles = [axes.get_title() for axes in figures.noise_figure(runs).axes if axes.get_title()]
    assert [title.split(":")[0] for title in titles] == ["none", "sym20", "sym40"]
    assert titles[0] == "none: 0.0 % flipped"


def test_curves_average_the_intervals_of_an_epoch():
    lines = [{"epoch": 1, "loss/total": 1.0}, {"epoch": 1, "loss/total": 3.0}, {"epoch": 2, "loss/total": float("nan")}]
    assert by_epoch(lines, "loss/total") == {1: 2.0}


def test_flipped_images_have_curves_where_there_are_any(experiment, monkeypatch):
    _, cells = experiment

    def shown(line):
        monkeypatch.setattr(Run, "history", lambda self, stage: [line] if stage == "finetune" else [])
        return [ax.get_ylabel().replace("\n", " ") for ax in curves_figure(cells).axes if ax.get_ylabel()]

    plain = ["finetune training loss", "finetune validation balanced accuracy"]
    assert shown({"epoch": 1, "loss/total": 1.0}) == plain
    learnt = {"train/flipped_as_given": 0.5, "train/flipped_as_true": 0.5, "train/auroc_weight": 0.5}
    flipped = [
        "finetune flipped images classified as labelled, wrongly",
        "finetune flipped images classified as they truly are",
        "finetune AUROC of low weights for flipped images",
    ]
    assert shown({"epoch": 1, **learnt}) == plain + flipped


@pytest.mark.parametrize(("short", "by_share"), [(2, True), (3, False)])
def test_trainings_of_very_different_lengths_share_an_axis(experiment, monkeypatch, short, by_share):
    _, cells = experiment

    def history(run, stage):
        epochs = 9 if run["row"] == cells[0].runs[0]["row"] else short
        return [{"epoch": k + 1, "loss/total": 1.0} for k in range(epochs if stage == "finetune" else 0)]

    monkeypatch.setattr(Run, "history", history)
    panel = max(curves_figure(cells).axes, key=lambda ax: len(ax.lines))
    assert {line.get_xdata()[-1] for line in panel.lines} == ({1} if by_share else {9, 3})
    assert (panel.get_xlabel() == "share of the epochs") == by_share


def test_an_odd_number_of_curves_of_one_column_leaves_a_place_empty(experiment, monkeypatch):
    _, cells = experiment
    line = {"epoch": 1, "loss/total": 1.0, "val/balanced_accuracy": 0.5, "train/auroc_weight": 0.5}
    monkeypatch.setattr(Run, "history", lambda self, stage: [line] * (stage == "finetune"))
    axes = curves_figure([cell for cell in cells if cell.head == cells[0].head]).axes
    assert [ax.axison for ax in axes] == [True, True, True, False]
    assert [ax.get_xlabel() for ax in axes] == ["", "epoch", "epoch", ""]  # below the lowest panel of either column


def test_lines_of_one_name_keep_their_curves(experiment, monkeypatch):
    _, cells = experiment
    head = max((cell.head for cell in cells), key=[cell.head for cell in cells].count)
    members = [replace(cell, line="same") for cell in cells if cell.head == head]
    monkeypatch.setattr(Run, "history", lambda self, stage: [{"epoch": 1, "loss/total": 1.0}] * (stage == "finetune"))
    drawn = [line for line in curves_figure(members).axes[0].lines if line.get_linewidth() > 1]
    assert len(drawn) == len(members) > 1


def test_nothing_finished_still_gives_figures(experiment):
    runs, _ = experiment
    failed = make_cells([run for run in runs if not run.finished], "noise")
    assert figures.metric_figure(failed, MEASURE).texts[0].get_text() == "No run has finished yet"
    assert figures.confusion_figure(failed, MEASURE).texts[0].get_text() == "No run has finished yet"
    assert figures.noise_figure([]).texts[0].get_text() == "No labels have been made yet"
    assert curves_figure([]).texts[0].get_text() == "No training has started yet"


def test_weights_figure_tells_flipped_labels_from_the_others(experiment, monkeypatch):
    _, cells = experiment
    table = pd.DataFrame(
        {"epoch": [1, 2, 2, 2, 2], "weight": [9.0, 0.0, 1.0, 1.0, 2.0], "trust": np.nan, "is_flipped": [0, 1, 0, 0, 0]}
    )
    monkeypatch.setattr(Run, "weights", lambda self: table)
    figure = figures.weights_figure(cells[:1])
    (axes,) = (ax for ax in figure.axes if ax.get_title())  # no panel for the trusts, which nobody has
    assert axes.get_title().replace("\n", " ").endswith("weight, AUROC 1.00")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["label kept", "label flipped"]
    assert axes.get_xlim()[1] < 3  # of the last epoch only
    monkeypatch.setattr(Run, "weights", lambda self: table.assign(is_flipped=0))
    figure = figures.weights_figure(cells[:1])
    assert not any("AUROC" in ax.get_title() for ax in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["label kept"]


def test_class_figure_shows_each_class_and_the_average(experiment):
    _, cells = experiment
    figure = classes_figure(cells[:2], "last")
    (axes,) = figure.axes
    assert axes.get_title() == "test"
    runs = [run.score("last", "test") for run in cells[0].finished]
    widths = [bar.get_width() for bar in axes.patches]
    recall = sum(found["per_class"]["MEL"]["recall"] for found in runs) / len(runs)
    assert any(abs(width - recall) < 1e-9 for width in widths)
    assert len(widths) == 2 * 7  # the last class has no test image
    means = [line.get_xdata()[0] for line in axes.lines]
    assert means[0] == pytest.approx(sum(found["metrics"]["accuracy"]["value"] for found in runs) / len(runs))
