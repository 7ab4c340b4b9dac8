"""`snakemake --profile slurm`, as one types it, from a folder like a fresh clone to the report."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "fixtures" / "config_tiny.yaml"

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def clone(tmp_path) -> Path:
    """What a clone has, with the profile of the tests' cluster in the place of the shipped one."""
    for name in ("workflow", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "Snakefile", tmp_path)
    shutil.copy(ROOT / "slurm", tmp_path, follow_symlinks=False)
    shutil.copy(ROOT / "tests" / "slurm" / "profile" / "config.yaml", tmp_path / "profiles" / "slurm")
    return tmp_path


def snakemake(folder: Path, *arguments: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["snakemake", "--profile", "slurm", "--configfile", str(TINY), *arguments]
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, cwd=folder, env=env, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def slurm_jobs(since: str) -> list[list[str]]:
    """Name, partition, account, state and comment of the jobs after a time."""
    command = ["sacct", "-nPX", f"--starttime={since}", "--format=jobname,partition,account,state,alloccpus"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split("|") for line in text.splitlines()]


def test_whole_chain_through_both_roads(clone, slurm):
    said = snakemake(clone)
    run = said.split("SLURM run ID: ", 1)[1].split()[0]
    jobs = [job for job in slurm_jobs("today") if job[0] == run]
    assert len(jobs) == 7  # data, split, noise, two finetunings and their evaluations
    assert {tuple(job[1:4]) for job in jobs} == {("cpu", "lab", "COMPLETED")}
    (log,) = (clone / "logs" / "pretrain").iterdir()
    assert "launch: job " in log.read_text()
    assert (clone / "results" / "tiny" / "report.html").exists()
    assert (clone / "logs" / "slurm" / f"efficiency_report_{run}.csv").exists()
    assert "Nothing to be done" in snakemake(clone, "-n")
