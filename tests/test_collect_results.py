"""docs/results/collect.py: a finished paper becomes one page with its figures."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).parents[1] / "docs" / "results" / "collect.py"


@pytest.fixture
def collect(tmp_path, monkeypatch):
    """The script, at work in a folder of its own."""
    spec = importlib.util.spec_from_file_location("collect_results", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(module, "HERE", tmp_path / "docs")
    return module


def write_results(experiments):
    """What a run leaves of the experiments, each with its figures."""
    for name, figures in experiments.items():
        settings: dict[str, dict] = {"evaluate": {}}
        settings |= {"finetune": {"method": "reweight"}} if "weights" in figures else {}
        settings |= {"mask": {}} if "panels" in figures else {}
        settings |= {"noise": {"kind": "symmetric", "rate": 0.4}} if "curves" in figures else {}
        settings["evaluate"] |= {"coverages": [1.0]} if "coverage" in figures else {}
        run = {"keys": {"finetune": "k"}, "settings": settings}
        files = {
            f"results/{name}/table.md": f"# Title of {name}\n\n1. Order of the rows: Spearman's rank correlation 0.9\n",
            f"results/{name}/claim.md": "# Claim\n\nNone.\n",
            f"results/{name}/summary.csv": "a,b\n",
            f"results/{name}/config.json": json.dumps({"inputs": {"runs": f"results/runs/{name}-abc/runs.json"}}),
            f"results/runs/{name}-abc/runs.json": json.dumps({"runs": [run]}),
            f"results/runs/{name}-old/runs.json": json.dumps({"runs": [{"keys": {"finetune": "gone"}}]}),
        }
        every = ("metric", "weights", "curves", "coverage", "panels")  # some of them left from another config
        files |= {f"results/{name}/figures/{figure}.png": figure for figure in every}
        for path, text in files.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text)
    folder = Path("results/finetune/k")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"commit": "abc"}))
    (folder / "record.json").write_text(json.dumps({"seconds": 3600, "ranks": 1, "device": "cpu"}))
    Path("paper.yaml").write_text(yaml.safe_dump({"experiments": dict.fromkeys(experiments)}, sort_keys=False))


def test_a_page_with_the_figures_that_there_are(collect):
    write_results({"plain": (), "masked": ("panels", "coverage", "weights", "curves")})
    collect.main(Path("paper.yaml"))
    page = Path("docs/paper.md").read_text()
    plain, masked = page.split("## Title of masked")
    assert "rank correlation 0.9" in plain
    assert "rank correlation 0.9" in masked
    assert plain.count("![") == 1
    for name in (
        "paper-masked.png",
        "paper-masked.coverage.png",
        "paper-masked.weights.png",
        "paper-masked.curves.png",
        "paper-masked.panels.png",
    ):
        assert f"]({name})" in masked
    assert Path("docs/paper-masked.panels.png").read_text() == "panels"
    assert {path.name for path in Path("docs").glob("paper-plain*")} == {"paper-plain.png", "paper-plain.csv"}
    assert "1 trainings, 1.00 process hours on cpu" in page
