"""The stage panels: which settings of masks it chooses, and the figure of them, from real trainings."""

import json
from pathlib import Path

import pytest
from PIL import Image

from medmask import cli
from medmask.evaluation.cells import Measure, make_cells
from medmask.evaluation.collect import read_runs
from medmask.saliency import settings_figure
from medmask.stages.panels import worst_and_best
from tests.toy import SETTINGS, train_masked, write_data

RULES = {
    "poor": {"kind": "threshold", "strength": 0.1},
    "good": {"kind": "top_k", "strength": 0.3},
    "random": {"kind": "random", "strength": 0.3},
}
VALUES = {"poor": 0.5, "good": 0.8, "random": 0.9, "erm": 0.95}
MEASURE = Measure("accuracy", "raw", "last")


def score(value):
    per_class = {"c0": {"n": 5, "recall": value + 0.04}, "c1": {"n": 5, "recall": None}}
    return {"metrics": {"accuracy": {"value": value}}, "per_class": per_class, "n": 10, "n_groups": 10, "absent": []}


def plan(row, seed, dataset):
    keys = {"pretrain": "erm", "evaluate": f"{row}-{dataset}-s{seed}"}
    settings = {"pretrain": SETTINGS}
    if row != "erm":
        keys |= {"mask": "maps", "finetune": row}
        settings["finetune"] = {**SETTINGS, "epochs": 1, "masks": "x", "mask_rule": RULES[row]}
        settings["mask"] = {"method": "xgradcam", "hidden_by": {"kind": "top_k", "cumulative": True}}
    fields = {"dataset": dataset, "split": "s", "noise": "none", "pretrain": "erm", "finetune": row, "evaluate": "e"}
    return {"run": row, "row": row, "label": row, **fields, "set": {}, "seed": seed, "keys": keys, "settings": settings}


def write_runs(results, rows, *, seeds=(0, 1), datasets=("a",), columns=None):
    """The runs file and the evaluations; the first dataset is easier for all."""
    plans = [plan(row, seed, dataset) for row in rows for dataset in datasets for seed in seeds]
    for each in plans:
        folder = results / "evaluate" / each["keys"]["evaluate"]
        folder.mkdir(parents=True, exist_ok=True)
        value = VALUES[each["row"]] + 0.01 * each["seed"] - 0.1 * datasets.index(each["dataset"])
        scores = {"last": {"raw": score(value), "other": score(value / 2)}, "best": {}}
        (folder / "metrics.json").write_text(json.dumps({**scores, "constants": {}}))
        for name in ("predictions.csv", "predictions_best.csv"):
            (folder / name).touch()
    table = {"metric": "accuracy", "test_set": "raw", "selection": "last", "columns": columns, "decimals": 3}
    path = results / "runs" / "x-abc" / "runs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"experiment": "x", "settings": {"table": table}, "runs": plans}))
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Trained where the folder is, so that the inputs are written down as paths below it."""
    folder = tmp_path_factory.mktemp("panels")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_masked(Path("results"), write_data(Path("results/data/toy")), RULES)
    return folder / "results"


def draw(monkeypatch, runs, out):
    """Exit code, and the settings that were drawn."""
    calls = []
    real = settings_figure.draw_settings
    monkeypatch.setattr(settings_figure, "draw_settings", lambda *args: calls.append(args[0]) or real(*args))
    code = cli.main(["panels", "--config", '{"n": 2}', "--runs", str(runs), "--panels", str(out)])
    return code, calls


def test_worst_and_best_setting_side_by_side(results, monkeypatch, tmp_path):
    """Called from another folder than that of the results."""
    out = tmp_path / "panels.png"
    code, (columns,) = draw(monkeypatch, write_runs(results, ["erm", "good", "poor", "random"]), out)
    assert code == 0
    assert [[setting.title.split("\n") for setting in row] for row in columns] == [
        [
            ["worst: poor", "accuracy on raw 0.505 (mean of 2); here seed 0"],
            ["best: good", "accuracy on raw 0.805 (mean of 2); here seed 0"],
        ]
    ]
    worst, best = columns[0]
    assert (worst.look.images == best.look.images).all()
    assert (worst.look.before == best.look.before).all()  # both start from the same network
    assert (worst.look.masks != best.look.masks).any()
    assert worst.accuracy == {"raw": {"c0": 0.54, "c1": None, None: 0.5}, "other": {"c0": 0.29, "c1": None, None: 0.25}}
    assert min(Image.open(out).size) > 600


def test_each_column_of_the_table_has_its_own(results):
    path = write_runs(results, ["good", "poor"], datasets=("a", "b"), columns="dataset")
    chosen = worst_and_best(make_cells(read_runs(path)[1], "dataset"), MEASURE)
    named = [[(word, cell.name) for word, cell in row] for row in chosen]
    assert named == [[("worst", f"poor, dataset {d}"), ("best", f"good, dataset {d}")] for d in "ab"]


def test_one_setting_and_random_places_alone(results, monkeypatch, tmp_path):
    _, (columns,) = draw(monkeypatch, write_runs(results, ["erm", "random"]), tmp_path / "p.png")
    assert [setting.title.split("\n")[0] for setting in columns[0]] == ["only: random"]


def test_less_calibration_error_is_better(results):
    cells = make_cells(read_runs(write_runs(results, ["good", "poor"]))[1], None)
    for cell in cells:
        for run in cell.runs:
            numbers = run.metrics["last"]["raw"]["metrics"]
            numbers["ece"] = numbers["accuracy"]
    ((worst, best),) = worst_and_best(cells, Measure("ece", "raw", "last"))
    assert (worst[1].row, best[1].row) == ("good", "poor")


@pytest.mark.parametrize("rows", [["erm"], ["good", "poor"]])
def test_without_networks_there_is_a_figure_all_the_same(results, tmp_path, rows):
    """No masked row, or results that were copied without the trainings: the table does not wait for it."""
    out = tmp_path / "panels.png"
    runs = write_runs(tmp_path / "results", rows)
    assert cli.main(["panels", "--config", "{}", "--runs", str(runs), "--panels", str(out)]) == 0
    assert max(Image.open(out).size) < 900
