import csv
import json
import shutil
import subprocess
import sys

import pytest

from medmask.cli import main
from medmask.stages import aggregate
from tests.evaluation.fake_results import make_results


def flags(runs, folder):
    names = {name: name.replace("_", ".") for name in aggregate.OUTPUTS} | {
        "summary": "summary.csv", "runs_csv": "runs.csv", "claim": "claim.md",
    }  # fmt: skip
    given = [text for name, file in names.items() for text in (f"--{name.replace('_', '-')}", str(folder / file))]
    return ["aggregate", "--config", '{"draws": 100}', "--runs", str(runs), *given]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("fake")
    return root, make_results(root, n=60, seeds=(0, 1), draws=100)


@pytest.fixture(scope="module")
def done(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    assert main(flags(tree[1], folder)) == 0
    return folder


def test_all_files_and_nothing_else(done):
    found = {path.name for path in done.iterdir()}
    assert len(found) == len(aggregate.OUTPUTS) + 1  # and config.json
    assert {"summary.csv", "table.csv", "table.md", "table.tex", "table.html", "metric.svg", "claim.md"} <= found
    with (done / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["line"] for row in rows[:2]] == ["Constant predictor"] * 2
    assert sum(int(row["n_finished"] or 0) for row in rows) == 19


def test_coverages_have_a_figure_where_it_is_asked_for(tree, done, tmp_path):
    """The record stays beside the tables, wherever the figure lies."""
    assert not (done / "coverage.png").exists()
    root, out = tmp_path / "root", tmp_path / "out"
    shutil.copytree(tree[0], root)
    for metrics in (root / "results" / "evaluate").glob("*/metrics.json"):
        rows = [{"wanted": 0.9, "threshold": 0.6, "coverage": 0.8, "n": 40, "error": 0.25}]
        metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"selective": {"test": rows}}))
    asked = [f"--coverage-{kind}={out / 'figures' / f'coverage.{kind}'}" for kind in ("png", "svg")]
    assert main([*flags(root / "results" / "runs" / "noisy-abc" / "runs.json", out), *asked]) == 0
    assert {path.name for path in (out / "figures").iterdir()} == {"coverage.png", "coverage.svg"}
    assert (out / "config.json").exists()
    text = (out / "table.md").read_text()
    assert "|  | 90 % wanted |" in text
    assert "| Baseline, noise none | 0.250 ± 0.000 (80.0 %) |" in text
    assert "Coverages: a threshold on the confidence" in text


def test_twice_the_same_bytes(tree, done, tmp_path):
    assert main(flags(tree[1], tmp_path)) == 0
    for path in done.iterdir():
        if path.name != "config.json":
            assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_nothing_finished(tree, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(tree[0] / "results" / "runs", root / "results" / "runs")
    assert main(flags(root / "results" / "runs" / "noisy-abc" / "runs.json", tmp_path / "out")) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "Nothing has finished yet" in text
    assert "failed (0 of 2)" in text
    assert "data: not run yet (no log)" in text
    assert "**incomplete**" in (tmp_path / "out" / "claim.md").read_text()
    assert len((tmp_path / "out" / "summary.csv").read_text().splitlines()) == 1


def test_a_broken_or_partial_evaluation_blocks_nothing(tree, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(tree[0], root)
    evaluated = root / "results" / "evaluate"
    (evaluated / "baseline-none-s0" / "metrics.json").write_text("{")
    (evaluated / "baseline-none-s1" / "predictions.csv").unlink()
    assert main(flags(root / "results" / "runs" / "noisy-abc" / "runs.json", tmp_path / "out")) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "not JSON" in text
    assert "predictions.csv is missing beside metrics.json" in text


def test_a_runs_file_without_its_keys_is_refused(tmp_path, capsys):
    path = tmp_path / "results" / "runs" / "x" / "runs.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"runs": []}))
    assert main(flags(path, tmp_path / "out")) == 2
    assert "got no experiment, settings" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_runs_without_torch():
    code = "import sys, medmask.stages.aggregate, medmask.evaluation.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
