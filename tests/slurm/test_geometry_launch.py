"""What the launcher writes into a job's script, for each shape of job: no cluster is needed."""

import re
from pathlib import Path

import pytest
import submitit

from medmask.errors import ConfigError
from medmask.launch.job import Options, Task
from medmask.launch.slurm import parameters

COMMON = """\
--job-name=medmask-0123456789ab
--open-mode=append
--requeue
""".splitlines()


def script(monkeypatch, tmp_path, **changes) -> str:
    """The text that submitit would hand to sbatch."""
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 1))
    values = {"cluster": "slurm", "ranks": 8, "work_dir": tmp_path / "work", "minutes": 240, **changes}
    options = Options(**values)
    task = Task("medmask-0123456789ab", "pretrain", ["pretrain"], [(Path("a"), Path("b"))])
    executor = submitit.SlurmExecutor(tmp_path)
    executor.update_parameters(**parameters(task, options, tmp_path))
    return executor._make_submission_file_text(executor._submitit_command_str, "uid")


def flags(text: str) -> list[str]:
    """Options of a script, without the names of the logs."""
    found = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    return [flag for flag in found if not flag.startswith(("--output", "--error"))]


SHAPES = {
    "one GPU": (
        {"ranks": 1, "gpus": 1, "cpus_per_rank": 4, "mem_mb": 16000, "partition": "gpu", "account": "lab"},
        "--account=lab --cpus-per-task=4 --gpus-per-node=1 --mem=16000M --nodes=1 --ntasks-per-node=1 --partition=gpu "
        "--signal=USR2@120 --time=240",
    ),
    "eight GPUs on one node": (
        {"gpus": 8, "cpus_per_rank": 4, "mem_mb": 64000, "partition": "gpu", "account": "lab"},
        "--account=lab --cpus-per-task=4 --gpus-per-node=8 --mem=64000M --nodes=1 --ntasks-per-node=8 --partition=gpu "
        "--signal=USR2@120 --time=240",
    ),
    "two nodes of eight": (
        {"ranks": 16, "gpus": 16, "nodes": 2, "cpus_per_rank": 4, "mem_mb": 128001, "partition": "gpu"},
        "--cpus-per-task=4 --gpus-per-node=8 --mem=64001M --nodes=2 --ntasks-per-node=8 --partition=gpu "
        "--signal=USR2@120 --time=240",
    ),
    "two ranks without a GPU": (
        {"ranks": 2, "cpus_per_rank": 2, "mem_mb": 4000, "minutes": 1, "partition": "cpu", "account": "lab"},
        "--account=lab --cpus-per-task=2 --mem=4000M --nodes=1 --ntasks-per-node=2 --partition=cpu "
        "--signal=USR2@15 --time=1",
    ),
    "eight ranks on two nodes without GPUs, the site's defaults": (
        {"nodes": 2, "minutes": 1.5},
        "--cpus-per-task=1 --nodes=2 --ntasks-per-node=4 --signal=USR2@22 --time=2",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_options_of_sbatch(monkeypatch, tmp_path, name):
    changes, expected = SHAPES[name]
    assert flags(script(monkeypatch, tmp_path, **changes)) == sorted([*COMMON, *expected.split()])


def test_commands_of_the_script(monkeypatch, tmp_path):
    text = script(monkeypatch, tmp_path, cpus_per_rank=4, minutes=10, max_requeues=7)
    text = re.sub(r"\S*/python\S*", "PYTHON", text.replace(str(tmp_path), "/run"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines == [
        "export MEDMASK_STOP_AT=$(( ${SLURM_JOB_END_TIME:-$(( $(date +%s) + 600 ))} - 120 ))",
        "ln /run/*.pkl /run/${SLURM_JOB_ID}_submitted.pkl 2>/dev/null || true",
        "export SUBMITIT_EXECUTOR=slurm",
        "srun --unbuffered --output /run/%j_%t_log.out --error /run/%j_%t_log.err --cpus-per-task=4 "
        "--kill-on-bad-exit=1 --wait=0 PYTHON -u -m submitit.core._submit /run",
        "code=$?",
        "PYTHON -m medmask.launch.after --folder /run --work-dir /run/work --max-requeues 7 --code $code",
        "exit $code",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": None}, "--minutes: needed with --cluster slurm"),
        ({"ranks": 3, "nodes": 2}, "--ranks: 3 cannot be shared evenly by 2 nodes"),
        ({"gpus": 3, "nodes": 2}, "--gpus: 3 cannot be shared evenly by 2 nodes"),
    ],
)
def test_shapes_that_cannot_be(monkeypatch, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        script(monkeypatch, tmp_path, **changes)
