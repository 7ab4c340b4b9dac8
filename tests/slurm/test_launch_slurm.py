"""Launchers that are killed, stopped or started twice, on a real Slurm: one job in all, and the same weights."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medmask import cli
from medmask.models.weights import read_model
from tests.slurm.demo import ROOT, hasten, slurm
from tests.toy import SETTINGS, is_same, wait_for, write_data

NAMES = {"model": ".safetensors", "best": ".safetensors", "history": ".jsonl", "record": ".json"}
LONG = {
    **SETTINGS,
    "batch_size": 16,
    "ranks": 2,
    "augment": {"flip": 0.5},
    "schedule": {"kind": "cosine"},
    "epochs": 60,
}

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("slurm"),
]


class Run:
    """One training in a folder, and the launchers that are started for it."""

    def __init__(self, folder: Path, data: dict[str, Path]) -> None:
        self.folder, self.data = folder, data
        self.work, self.out = folder / "work", folder / "out"
        self.launchers: list[subprocess.Popen] = []
        self.waiting: dict[str, float] = {}

    def start(self, *flags: str, path: str = "", env: dict[str, str] | None = None) -> subprocess.Popen:
        line = [sys.executable, "-m", "medmask.launch", "--cluster", "slurm", "--ranks", "2", "--account", "lab",
                "--partition", "cpu", "--work-dir", str(self.work), "--minutes", "20", "--mem-mb=8000",
                "--poll-seconds", "0.5", *flags, "--", "finetune", "--config", json.dumps(LONG)]  # fmt: skip
        line += [text for name, file in self.data.items() for text in (f"--{name}", str(file))]
        line += [text for name, end in NAMES.items() for text in (f"--{name}", str(self.out / f"{name}{end}"))]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{path}:{os.environ['PATH']}".lstrip(":")}
        environ |= env or {}
        self.launchers.append(subprocess.Popen(line, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True))
        return self.launchers[-1]

    def end(self, code: int = 0, seconds: float = 200) -> str:
        """Wait for the newest launcher, starting requeued jobs soon; returns what it said."""
        process, end = self.launchers[-1], time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            hasten(self.folder, self.waiting)
            time.sleep(0.5)
        assert process.poll() is not None, "launcher still waits"
        said = process.communicate()[1]
        assert process.returncode == code, said
        return said

    @property
    def name(self) -> str:
        return str(self.job().get("name", ""))

    def job(self) -> dict:
        path = self.work / "job.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def steps(self) -> list[int]:
        path = self.work / "history.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]

    def wait_for_step(self, step: int) -> str:
        wait_for(lambda: max(self.steps(), default=0) >= step)
        return self.job()["job_id"]

    def weights(self) -> dict:
        return read_model(self.out / "model.safetensors")[0]

    def losses(self) -> list[tuple[int, float]]:
        rows = map(json.loads, (self.out / "history.jsonl").read_text().splitlines())
        return [(row["step"], row["loss/total"]) for row in rows if "loss/total" in row]

    def clean_up(self) -> None:
        for process in self.launchers:
            if process.poll() is None:
                process.kill()
        if job := self.job().get("job_id"):
            subprocess.run(["scancel", job], check=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), n=200, n_val=40)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    run = Run(tmp_path_factory.mktemp("whole"), data)
    run.start()
    run.end()
    return run


@pytest.fixture
def run(tmp_path, data):
    run = Run(tmp_path, data)
    yield run
    run.clean_up()


def jobs_of(name: str) -> int:
    return len(slurm("sacct", "--noheader", "--allocations", "--parsable2", f"--name={name}", "--format=JobID").split())


def assert_same(run: Run, whole: Run, jobs: int = 1) -> None:
    """The weights and the history of the undisturbed run, and no job too many."""
    assert is_same(run.weights(), whole.weights())
    assert run.losses() == whole.losses()
    assert len(list((run.work / "launch").iterdir())) == jobs
    assert not (run.work / "job.json").exists()
    assert not list(run.work.glob("*.lease"))


def test_preempted_by_a_more_urgent_job(run, whole):
    run.start()
    job = run.wait_for_step(150)
    urgent = slurm("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 5",
                   "--output=/dev/null")  # fmt: skip
    try:
        wait_for(lambda: slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T") == "PENDING")
        said = run.end()
    finally:
        subprocess.run(["scancel", urgent], check=False)
    assert ", requeued 1 time" in said
    assert_same(run, whole)


def test_the_launcher_is_killed_and_started_again(run, whole):
    run.start().kill()
    time.sleep(0.1)
    first = run.start()
    run.wait_for_step(150)
    first.kill()
    first.wait()
    second = run.start()
    wait_for(lambda: f'"pid": {second.pid},' in (run.work / "launcher.lease").read_text())
    third = run.start()
    third.wait()
    assert third.returncode == 2
    assert "is waiting for the job here" in third.stderr.read()
    run.launchers = [first, second]
    name = run.name
    assert "following job" in run.end()
    assert_same(run, whole)
    assert jobs_of(name) == 1


def test_the_launcher_is_killed_before_it_knows_the_job(run, whole, tmp_path):
    """An sbatch that kills who called it, once the job is accepted."""
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/bash\n{slurm("which", "sbatch")} "$@"\nkill -9 $PPID\n')
    fake.chmod(0o755)
    assert run.start(path=str(fake.parent)).wait(60) == -signal.SIGKILL
    assert run.job()["job_id"] is None
    name = run.name
    run.start()
    assert "found by its name" in run.end()
    assert_same(run, whole)
    assert jobs_of(name) == 1


def test_a_job_that_ends_while_nobody_waits(run, whole):
    launcher = run.start()
    run.wait_for_step(150)
    launcher.kill()
    launcher.wait()
    name = run.name
    wait_for(lambda: bool(list(run.work.glob("finished-*/record.json"))))
    assert not run.out.exists()
    run.start()
    assert "a job had finished this run" in run.end()
    assert_same(run, whole)
    assert jobs_of(name) == 1


def test_detached_by_ctrl_c_and_followed_again(run, whole):
    run.start().send_signal(signal.SIGTERM)  # before a job is there
    run.launchers[-1].wait(60)
    launcher = run.start()
    job = run.wait_for_step(100)
    launcher.send_signal(signal.SIGINT)
    assert f"job {job} goes on; the same command follows it again, `scancel {job}` ends it" in run.end(cli.STOPPED)
    run.start()
    run.end()
    assert_same(run, whole)


def test_cancelled_by_ctrl_c_and_gone_on_with(run, whole):
    launcher = run.start("--on-exit", "cancel")
    job = run.wait_for_step(150)
    launcher.send_signal(signal.SIGINT)
    assert f"told to stop: job {job} is to save its state and end" in run.end(cli.STOPPED)
    wait_for(lambda: not slurm("squeue", "--noheader", "--states=RUNNING,PENDING,COMPLETING", f"--jobs={job}"))
    step = max(int(path.stem[11:]) for path in run.work.glob("checkpoint-*.pt"))
    assert step >= 150
    run.start()
    run.end()
    assert_same(run, whole, jobs=2)


def test_cancelled_by_hand(run):
    run.start()
    job = run.wait_for_step(100)
    slurm("scancel", job)
    said = run.end(cli.STOPPED)
    assert f"job {job} was cancelled; log: {run.work.resolve()}/launch/001/{job}_0_log.err; the same command" in said


@pytest.mark.parametrize(("flag", "reason"), [("--partition", "partition"), ("--account", "account")])
def test_a_wrong_place_is_refused_in_one_line(run, flag, reason):
    run.start(flag, "nowhere")
    said = run.end(2).splitlines()
    assert len(said) == 1
    assert said[0].startswith("medmask launch: error: sbatch: ")
    assert reason in said[0].lower()
    assert "nowhere" in said[0]
    assert run.job() == {}
