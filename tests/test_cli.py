"""Exit codes, and outputs that appear all together or not at all."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from medmask import cli
from medmask.config.data import Noise
from medmask.errors import DataError, Stopped


@pytest.fixture
def stage(monkeypatch):
    """A stage in memory; set `.run` to what it is to do."""
    module = ModuleType("stage")
    module.CONFIG, module.INPUTS, module.OPTIONAL, module.OUTPUTS = Noise, ("split",), ("extra",), ("labels", "summary")
    module.TRAINS, module.tidied = True, []
    module.tidy = lambda work_dir: module.tidied.append((work_dir, names(work_dir.parent / "out")))
    monkeypatch.setattr(cli, "stage_module", lambda name: module)
    return module


def call(tmp_path, *more, config='{"kind": "none"}'):
    (tmp_path / "split.csv").touch()
    outputs = [f"--{name}={tmp_path / 'out' / name}" for name in ("labels", "summary")]
    flags = [f"--config={config}", f"--split={tmp_path / 'split.csv'}", *outputs, f"--work-dir={tmp_path / 'work'}"]
    return cli.main(["noise", *flags, *more])


def names(folder: Path):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def write_both(cfg, *, labels, summary, **_):
    labels.write_text("new")
    summary.write_text("new")


def test_done_is_0_and_says_what_made_the_outputs(stage, tmp_path):
    stage.run = write_both
    assert call(tmp_path) == 0
    assert names(tmp_path / "out") == ["config.json", "labels", "summary"]
    assert stage.tidied == [(tmp_path / "work", ["config.json", "labels", "summary"])]  # when the outputs stood
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert record["stage"] == "noise"
    assert record["config"]["kind"] == "none"
    assert record["inputs"] == {"split": str(tmp_path / "split.csv")}
    assert len(record["commit"].rstrip("+")) in (40, 7)  # a hash, or "unknown" outside a checkout


def test_the_config_of_a_result_can_be_used_again(stage, tmp_path):
    stage.run = write_both
    assert call(tmp_path) == 0
    assert call(tmp_path, config=str(tmp_path / "out" / "config.json")) == 0


@pytest.mark.parametrize("error", [DataError("labels.csv:3: need a class, got 'x'"), Stopped("stopped"), ValueError()])
def test_failure_leaves_earlier_outputs_and_no_partial_ones(stage, tmp_path, error, capsys):
    stage.run = write_both
    assert call(tmp_path) == 0
    before = {name: (tmp_path / "out" / name).read_text() for name in names(tmp_path / "out")}

    def fail(cfg, *, labels, **_):
        labels.write_text("half")
        raise error

    stage.run = fail
    if isinstance(error, ValueError):
        with pytest.raises(ValueError):  # noqa: PT011, a bug ends in its traceback
            call(tmp_path)
    else:
        assert call(tmp_path) == {DataError: 2, Stopped: 75}[type(error)]
        assert capsys.readouterr().err.splitlines()[-1].endswith(str(error))
    assert {name: (tmp_path / "out" / name).read_text() for name in names(tmp_path / "out")} == before
    assert len(stage.tidied) == 1


def test_a_refusal_is_kept_for_the_launcher_until_the_next_start(stage, tmp_path):
    def refuse(cfg, **_):
        raise DataError("no")

    stage.run = refuse
    assert call(tmp_path) == 2
    assert (tmp_path / "work" / "refused").read_text() == "no\n"
    stage.run = write_both
    assert call(tmp_path) == 0
    assert not (tmp_path / "work" / "refused").exists()


def test_what_a_killed_stage_left_is_swept_away(stage, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".part-1-labels").touch()
    stage.run = write_both
    assert call(tmp_path) == 0
    assert names(tmp_path / "out") == ["config.json", "labels", "summary"]


def test_other_ranks_write_nothing(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    stage.run = lambda cfg, **_: None
    assert call(tmp_path) == 0
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"kind": "symmetric", "rate": 2}', "noise.rate: need less than or equal to 1, got 2"),
        ('{"kind": "none", "x": 1}', "noise.x: unknown key (value 1)"),
        ('{"kind": ', "--config: not JSON"),
        ("nowhere.json", "--config: cannot read nowhere.json"),
    ],
)
def test_bad_settings_are_2(stage, tmp_path, capsys, config, message):
    assert call(tmp_path, config=config) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path / "out") == []


def test_a_missing_input_is_2(stage, tmp_path, capsys):
    stage.run = write_both
    assert call(tmp_path, f"--extra={tmp_path / 'nothing'}") == 2
    assert "--extra: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*cli.STAGES, *cli.COMMANDS])
def test_every_command_has_help(name):
    done = subprocess.run(
        [sys.executable, "-m", "medmask", name, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert (f"{name} [-h]") in done.stdout


def test_a_bug_is_1_with_its_traceback(tmp_path):
    code = "import medmask.cli as c; c.run_stage = lambda args: 1 / 0; import sys; sys.exit(c.main(sys.argv[1:]))"
    flags = ["runs", "--config", "{}", "--runs", str(tmp_path / "runs.json")]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_a_broken_pipe_in_a_stage_is_a_bug(stage, tmp_path):
    def lose_a_worker(cfg, **_):
        raise BrokenPipeError(32, "a loading process is gone")

    stage.run = lose_a_worker
    with pytest.raises(BrokenPipeError):
        call(tmp_path)


@pytest.mark.parametrize("command", ["doctor", "plan"])
def test_a_reader_who_has_seen_enough_gets_no_traceback(command):
    """`medmask plan | head -1`."""
    shell = f"set -o pipefail; {sys.executable} -m medmask {command} | (sleep 0.1; true)"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
