"""`snakemake --profile slurm`, as one types it, from a folder like a fresh clone to the report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

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


def start(folder: Path, *arguments: str, configfile: Path = TINY) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["snakemake", "--profile", "slurm", "--configfile", str(configfile), *arguments]
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=env,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    try:
        said, _ = process.communicate(timeout=280)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-6000:]
    return said


def call(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def run_id(said: str) -> str:
    return said.split("SLURM run ID: ", 1)[1].split()[0]


def jobs_of(run: str, *options: str) -> list[tuple[str, ...]]:
    """Partition, account, state and comment of the jobs of one Snakemake, which all have its name."""
    text = call("sacct", "-nPX", "--starttime=now-1days", f"--name={run}", "--format=partition,account,state", *options)
    return [tuple(line.split("|")) for line in text.splitlines()]


def test_whole_chain_through_both_roads(clone, slurm):
    said = finish(start(clone))
    run = run_id(said)
    # data, split, noise, two finetunings and their evaluations
    assert jobs_of(run) == [("cpu", "lab", "COMPLETED")] * 7
    (log,) = (clone / "logs" / "pretrain").iterdir()
    assert "launch: job " in log.read_text()
    assert (clone / "results" / "tiny" / "report.html").exists()
    assert (clone / "logs" / "slurm" / f"efficiency_report_{run}.csv").exists()
    assert "Nothing to be done" in finish(start(clone, "-n"))


def test_training_of_one_process_moves_when_its_node_dies(clone, slurm):
    config = yaml.safe_load(TINY.read_text())
    config["finetunings"]["plain"]["epochs"] = 250
    del config["experiments"]["tiny"]["runs"]["pretrained"]
    (clone / "long.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    process = start(clone, configfile=clone / "long.yaml")
    node = ""
    try:
        wait_for(lambda: any("epoch 20/" in log.read_text() for log in clone.glob("logs/finetune/*.log")))
        (line,) = [line for line in call("squeue", "-h", "--format=%A %N %Z").splitlines() if str(clone) in line]
        job, node, _ = line.split(" ", 2)
        call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        wait_for(lambda: call("squeue", "-h", f"--jobs={job}", "--format=%T") == "PENDING")
        time.sleep(5)  # the requeue sets its own start time at first
        call("scontrol", "update", f"JobId={job}", "StartTime=now")
        said = finish(process)
    finally:
        if node:
            call("scontrol", "update", f"NodeName={node}", "State=RESUME")
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    states = [state for _, _, state in jobs_of(run_id(said), "--duplicates")]
    assert sorted(states) == ["COMPLETED"] * 5 + ["NODE_FAIL"]  # the five stages once each: nothing was submitted twice
    (history,) = clone.glob("results/finetune/*/history.jsonl")
    steps = [row["step"] for row in map(json.loads, history.read_text().splitlines()) if "loss/total" in row]
    assert steps == sorted(set(steps))


def wait_for(is_true, seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.5)
