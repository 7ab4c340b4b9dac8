"""What `medmask plan` says."""

import importlib.util
import os
from pathlib import Path

import pytest
import yaml

from medmask import cli
from medmask.config.load import load_config
from medmask.errors import ConfigError
from medmask.plan import FINAL, read_config, statuses
from medmask.runs import make_plan
from tests.test_config import put, small


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A plan, and an empty folder to run it in."""
    monkeypatch.chdir(tmp_path)
    return make_plan(load_config(small()))


def finish(artifact, when):
    for upstream in artifact.inputs.values():
        finish(upstream, when - 10)
    last = Path(artifact.folder, FINAL[artifact.stage])
    last.parent.mkdir(parents=True, exist_ok=True)
    last.touch()
    os.utime(last, (when, when))
    return last


def test_all_is_new_in_an_empty_folder(plan):
    assert set(statuses(plan).values()) == {"new"}


def test_finished_artifacts_are_done(plan):
    run = plan.runs["e"][0]
    finish(run.artifacts["evaluate"], 1e9)
    found = statuses(plan)
    assert all(found[artifact.folder] == "done" for artifact in run.artifacts.values())
    assert found[plan.runs["e"][1].artifacts["evaluate"].folder] == "new"


def test_a_finished_training_with_a_newer_input_says_why_it_runs_again(plan):
    finetune = plan.runs["e"][0].artifacts["finetune"]
    finish(finetune, 1e9)
    labels = Path(finetune.inputs["noise"].folder, FINAL["noise"])
    os.utime(labels, (2e9, 2e9))
    assert statuses(plan)[finetune.folder] == (
        f"its input {finetune.inputs['noise'].folder} is newer (snakemake --touch keeps it)"
    )


def test_the_command_prints_jobs_runs_and_resources(plan, capsys):
    Path("my.yaml").write_text(yaml.safe_dump(put(small(), "pretrainings/base/ranks", 8)))
    assert cli.main(["plan", "--configfile", "my.yaml", "--runs"]) == 0
    text = capsys.readouterr().out
    assert "4 runs, 0 done, 4 new" in text
    assert "started (split holdout, noise sym, pretrain base, finetune plain) seed 1" in text
    (line,) = [line for line in text.splitlines() if "pretrain" in line and "│" in line]
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        "pretrain", "2", "0", "2", "8", "8", "16", "64", "4:00",
    ]  # fmt: skip
    assert "GPU-hours that new jobs may use at the most: 84" in text  # 2 x 8 x 4, 4 x 4 and 4 x 1


def test_a_method_of_a_later_version_is_planned_and_said(plan, capsys):
    Path("my.yaml").write_text(yaml.safe_dump(put(small(), "pretrainings/base/method", "noise_mask")))
    assert cli.main(["plan", "--configfile", "my.yaml"]) == 0
    assert "cannot run yet: " in capsys.readouterr().out


def test_a_missing_library_is_said_with_what_to_install(plan, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    raw = put(put(small(), "finetunings/plain/method", "confident"), "experiments/e/runs", {"r": {"finetune": "plain"}})
    Path("my.yaml").write_text(yaml.safe_dump(raw))
    assert cli.main(["plan", "--configfile", "my.yaml"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "cannot run yet: finetunings: `method: confident` needs cleanlab: pip install 'medmask[cleanlab]'" in text


def test_config_files_are_merged_as_snakemake_merges_them(tmp_path):
    (tmp_path / "a.yaml").write_text("x: {a: 1, b: 2}\ny: 1")
    (tmp_path / "b.yaml").write_text("x: {b: 3}")
    merged = read_config([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["data_root=/d", "y=2"])
    assert merged == {"x": {"a": 1, "b": 3}, "y": 2, "data_root": "/d"}


@pytest.mark.parametrize(
    ("text", "message"), [("x: [1", "not YAML"), ("- 1", "need named sections, got list"), (None, "cannot be read")]
)
def test_a_broken_config_file_is_named(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config([path], [])
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
