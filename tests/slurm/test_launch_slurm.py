"""The launcher on a real Slurm: what happens to jobs, and to launchers, changes no bit of the weights."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from medmask import cli
from medmask.models.weights import read_model
from tests.toy import SETTINGS, is_same, write_data

ROOT = Path(__file__).parents[2]
CONF = Path(os.environ.get("MEDMASK_SLURM_DIR", "/tmp/medmask-slurm")) / "slurm.conf"
NAMES = {"model": ".safetensors", "best": ".safetensors", "history": ".jsonl", "record": ".json"}
EPOCHS = 60
LONG = {**SETTINGS, "batch_size": 16, "ranks": 2, "augment": {"flip": 0.5}, "schedule": {"kind": "cosine"}}


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def has_cluster() -> bool:
    """Whether the tests' own cluster answers; nobody else's nodes are set down."""
    if not CONF.exists():
        return False
    os.environ["SLURM_CONF"] = str(CONF)
    try:
        return "up" in slurm("sinfo", "--noheader", "--format=%a")
    except (OSError, subprocess.SubprocessError):
        return False


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not has_cluster(), reason="no test cluster: run tests/slurm/cluster.sh up"),
]


def wait_for(is_true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


class Run:
    """One training in a folder, and the launchers that are started for it."""

    def __init__(self, folder: Path, data: dict[str, Path], epochs: int = EPOCHS, ranks: int = 2) -> None:
        self.folder, self.data, self.ranks = folder, data, ranks
        self.work, self.out = folder / "work", folder / "out"
        self.settings = {**LONG, "epochs": epochs, "ranks": ranks}
        self.launchers: list[subprocess.Popen] = []
        self.waited = 0  # half seconds that a requeued job was seen to wait

    def start(self, *flags: str, path: str = "", minutes: float = 20) -> subprocess.Popen:
        line = [sys.executable, "-m", "medmask.launch", "--cluster", "slurm", "--ranks", str(self.ranks), "--account",
                "lab", "--partition", "cpu", "--work-dir", str(self.work), "--minutes", str(minutes), "--mem-mb=8000",
                "--poll-seconds", "0.5", *flags, "--", "finetune", "--config", json.dumps(self.settings)]  # fmt: skip
        line += [text for name, file in self.data.items() for text in (f"--{name}", str(file))]
        line += [text for name, end in NAMES.items() for text in (f"--{name}", str(self.out / f"{name}{end}"))]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{path}:{os.environ['PATH']}".lstrip(":")}
        self.launchers.append(subprocess.Popen(line, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True))
        return self.launchers[-1]

    def end(self, code: int = 0, seconds: float = 200) -> str:
        """Wait for the newest launcher, starting requeued jobs at once; returns what it said."""
        process, end = self.launchers[-1], time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            self.hasten()
            time.sleep(0.5)
        assert process.poll() is not None, "launcher still waits"
        said = process.communicate()[1]
        assert process.returncode == code, said
        return said

    def hasten(self) -> None:
        """Start a requeued job after three seconds, not two minutes.

        At once would be too early: a node refuses a job's credential that is not younger than its last end.
        """
        job = slurm("squeue", "--noheader", f"--name={self.name}", "--format=%A %r") if self.name else ""
        self.waited = self.waited + 1 if job.endswith("BeginTime") else 0
        if self.waited == 6:
            subprocess.run(["scontrol", "update", f"JobId={job.split()[0]}", "StartTime=now"], check=False)

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

    def starts(self, number: int = 1) -> list[dict]:
        lines = (self.work / "launch" / f"{number:03d}" / "attempts.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == "start"]

    def weights(self) -> dict:
        return read_model(self.out / "model.safetensors")[0]


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
    for process in run.launchers:
        if process.poll() is None:
            process.kill()
    if job := run.job().get("job_id"):
        subprocess.run(["scancel", job], check=False)
    for node in ("n1", "n2"):
        subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=False, capture_output=True)


def jobs_of(name: str) -> int:
    return len(slurm("sacct", "--noheader", "--allocations", "--parsable2", f"--name={name}", "--format=JobID").split())


def assert_same(run: Run, whole: Run, jobs: int = 1, requeues: int = 0) -> None:
    """The weights of the undisturbed run, each step once in the history and in TensorBoard, and no job too many."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert is_same(run.weights(), whole.weights())
    lines = [json.loads(line) for line in (run.out / "history.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss/total" in line]
    expected = [json.loads(line) for line in (whole.out / "history.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss/total"]) for line in losses] == [
        (line["step"], line["loss/total"]) for line in expected if "loss/total" in line
    ]
    board = EventAccumulator(str(run.work / "tensorboard"))
    board.Reload()
    steps = Counter(event.step for event in board.Scalars("loss/total"))
    assert set(steps.values()) == {1}
    assert sorted(steps) == [line["step"] for line in losses]
    record, other = (json.loads((r.out / "record.json").read_text()) for r in (run, whole))
    assert record["images_seen"] == other["images_seen"]
    folders = sorted((run.work / "launch").iterdir())
    assert len(folders) == jobs
    assert [line["restart"] for line in run.starts()][-1] == requeues
    assert not (run.work / "job.json").exists()
    assert not list(run.work.glob("*.lease"))


def test_requeued_in_the_middle(run, whole):
    run.start()
    slurm("scontrol", "requeue", run.wait_for_step(150))
    said = run.end()
    assert ", requeued 1 time" in said
    assert_same(run, whole, requeues=1)


def test_one_rank_is_killed(run, whole):
    run.start()
    run.wait_for_step(150)
    rank = json.loads((run.work / "launch" / "001" / "rank-1.json").read_text())
    os.kill(rank["pid"], signal.SIGKILL)
    run.end()
    assert_same(run, whole, requeues=1)


def test_the_time_limit_is_reached(tmp_path_factory, run, whole):
    run.settings["epochs"] = 120
    run.start(minutes=1)
    run.end(seconds=400)
    requeues = run.starts()[-1]["restart"]
    assert requeues >= 1
    other = Run(tmp_path_factory.mktemp("long"), run.data, epochs=120)
    other.start()
    other.end()
    assert_same(run, other, requeues=requeues)


def test_a_node_goes_down(run, whole):
    run.start()
    job = run.wait_for_step(150)
    node = slurm("squeue", "--noheader", f"--jobs={job}", "--format=%N")
    slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    run.end()
    assert [line["nodes"] for line in run.starts()] == [[node], [{"n1": "n2", "n2": "n1"}[node]]]
    assert_same(run, whole, requeues=1)


def test_the_slurmd_of_a_node_is_killed(run, whole):
    """Slurm starts the job on the other node while the ranks of the first start still train."""
    script = str(ROOT / "tests" / "slurm" / "cluster.sh")
    run.settings["epochs"] = 600
    run.start()
    job = run.wait_for_step(100)
    node = slurm("squeue", "--noheader", f"--jobs={job}", "--format=%N")
    first = json.loads((run.work / "launch" / "001" / "rank-0.json").read_text())["pid"]
    subprocess.run([script, "node", node, "stop"], check=True)
    try:
        wait_for(lambda: run.hasten() or len(run.starts()) == 2)
        wait_for(lambda: not Path(f"/proc/{first}").exists(), seconds=60)  # it has lost the lease
        step = max(run.steps())
        run.wait_for_step(step + 20)
    finally:
        subprocess.run([script, "node", node, "start"], check=True)
        slurm("scancel", job)
        run.launchers[-1].wait(60)
    steps = [line["step"] for line in map(json.loads, (run.work / "history.jsonl").read_text().splitlines())]
    assert steps == sorted(steps)
    said = (run.work / "launch" / "001" / f"{job}_0_log.err").read_text()
    assert "no longer ours to write in; process" in said or "this one ends without writing anything more" in said
    assert json.loads((run.work / "launch" / "001" / "rank-0.json").read_text())["restart"] == 1


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
    assert "a job had finished this run" in run.end(seconds=20)
    (run.work / "job.json").unlink(missing_ok=True)
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
    said = run.end(2, seconds=30).splitlines()
    assert len(said) == 1
    assert said[0].startswith("medmask launch: error: sbatch: ")
    assert reason in said[0].lower()
    assert "nowhere" in said[0]
    assert run.job() == {}


def test_eight_ranks_on_two_nodes(tmp_path, data):
    run = Run(tmp_path, data, epochs=2, ranks=8)
    run.start("--nodes", "2")
    run.end(seconds=400)
    record = json.loads((run.out / "record.json").read_text())
    assert record["ranks"] == 8
    assert run.starts()[0]["nodes"] == ["n1", "n2"]
