"""The demo through `snakemake --profile slurm`, in a folder like a fresh clone, and faults that happen to it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import yaml

from medmask.models.weights import read_model
from tests.toy import is_same, wait_for

ROOT = Path(__file__).parents[2]
CLUSTER, HOOKS = (Path(__file__).with_name(name) for name in ("cluster.sh", "hooks"))
REQUEUE_WAIT = 4  # seconds before a requeued job is started, not two minutes; in its first ones Slurm would refuse it


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def demo_config() -> dict:
    """The shipped demo with one seed, its pretraining on 8 ranks."""
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    config["pretrainings"]["demo"]["ranks"] = 8
    config["pretrainings"]["demo"]["needs"]["mem_gb"] = 1
    config["experiments"]["demo"]["seeds"] = [0]
    return config


def hasten(folder: Path, waiting: dict[str, float]) -> None:
    """Start requeued jobs of a folder soon; `waiting` keeps when each was first seen to wait."""
    for line in slurm("squeue", "--noheader", "--states=PENDING", "--format=%A|%r|%o|%Z").splitlines():
        job, reason, *where = line.split("|")
        if reason == "BeginTime" and any(path.startswith(str(folder)) for path in where):
            since = waiting.setdefault(job, time.monotonic())
            if time.monotonic() - since > REQUEUE_WAIT:
                subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=False)
                del waiting[job]


class Demo:
    """A folder with what a clone has, the profile of the tests' cluster in the place of the shipped one."""

    def __init__(self, folder: Path, config: dict) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("workflow", "profiles"):
            shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
        shutil.copy(ROOT / "Snakefile", folder)
        if not (folder / "slurm").is_symlink():
            shutil.copy(ROOT / "slurm", folder, follow_symlinks=False)
        shutil.copy(ROOT / "tests" / "slurm" / "profile" / "config.yaml", folder / "profiles" / "slurm")
        (folder / "demo.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        self.process: subprocess.Popen | None = None
        self.env: dict[str, str] = {}
        self.waiting: dict[str, float] = {}  # requeued jobs, and when they were first seen to wait

    def without_pretraining(self, folder: Path) -> "Demo":
        """A copy of this finished folder in which the pretraining, and all that comes of it, is still to be done."""
        shutil.copytree(self.folder, folder, symlinks=True)
        for stage, role in (("finetune", "init"), ("evaluate", "model")):
            for path in (folder / "results" / stage).iterdir():
                source = json.loads((path / "config.json").read_text())["inputs"].get(role, "")
                if "results/pretrain" in source or (source and not (folder / source).exists()):
                    shutil.rmtree(path)
        for path in ("results/pretrain", "results/demo", "work", "logs"):
            shutil.rmtree(folder / path)
        return Demo(folder, yaml.safe_load((folder / "demo.yaml").read_text()))

    def start(self, *arguments: str, output: str = "said.txt") -> subprocess.Popen:
        """`snakemake --profile slurm` in a session of its own; what it says goes to a file."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOOKS), **self.env}
        command = [str(Path(sys.executable).with_name("snakemake")), "--profile", "slurm", "--configfile", "demo.yaml"]
        with (self.folder / output).open("w") as said:
            process = subprocess.Popen(
                [*command, *arguments],
                stdout=said,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=env,
                start_new_session=True,
            )
        self.process = process if output == "said.txt" else self.process
        return process

    def finish(self, code: int = 0, seconds: float = 300) -> str:
        """Wait for Snakemake, starting requeued jobs soon; returns what it said."""
        assert self.process is not None
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, self.said()[-6000:]
            self.hasten()
            time.sleep(0.5)
        assert self.process.returncode == code, self.said()[-6000:]
        return self.said()

    def call(self, *arguments: str, code: int = 0) -> str:
        self.start(*arguments)
        return self.finish(code)

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def hasten(self) -> None:
        hasten(self.folder, self.waiting)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to Snakemake and to all that it has started here."""
        assert self.process is not None
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                session = int(path.read_text().rpartition(")")[2].split()[3])
            except (OSError, IndexError):
                continue
            if session == self.process.pid:
                os.kill(int(path.parent.name), number)
        if number == signal.SIGKILL:
            self.process.wait()

    def clean_up(self) -> None:
        if self.process and self.process.poll() is None:
            self.kill()
        for line in slurm("squeue", "--noheader", "--format=%A %Z").splitlines():
            job, folder = line.split(" ", 1)
            if folder.startswith(str(self.folder)):
                subprocess.run(["scancel", job], check=False)
        for node in ("n1", "n2"):
            subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=False, capture_output=True)

    @property
    def work(self) -> Path:
        """Work folder of the pretraining."""
        return next(self.folder.glob("work/*/launch")).parent

    def has_step(self, step: int) -> bool:
        for path in self.folder.glob("work/*/launch/../history.jsonl"):
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            return any(json.loads(line)["step"] >= step for line in lines)
        return False

    def wait_for_step(self, step: int) -> str:
        """Wait for a step of the pretraining; returns the id of its job."""
        wait_for(lambda: self.has_step(step) or (self.process and self.process.poll() is not None))
        assert self.has_step(step), self.said()[-6000:]
        return self.job()["job_id"]

    def job(self) -> dict:
        return json.loads((self.work / "job.json").read_text())

    def rank(self, rank: int) -> dict:
        return json.loads((self.work / "launch" / "001" / f"rank-{rank}.json").read_text())

    def starts(self) -> list[dict]:
        lines = (self.work / "launch" / "001" / "attempts.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == "start"]

    def log(self) -> str:
        """All that the first rank of the pretraining wrote."""
        return "".join(path.read_text() for path in sorted(self.work.glob("launch/*/*_0_log.err")))

    def weights(self) -> dict[str, dict]:
        found = sorted(self.folder.glob("results/[pf]*/*/model.safetensors"))
        return {str(path.relative_to(self.folder)): read_model(path)[0] for path in found}

    def history(self) -> list[tuple[int, float]]:
        (path,) = self.folder.glob("results/pretrain/*/history.jsonl")
        rows = map(json.loads, path.read_text().splitlines())
        return [(row["step"], row["loss/total"]) for row in rows if "loss/total" in row]

    def board(self) -> list[int]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(self.work / "tensorboard"))
        board.Reload()
        return sorted(event.step for event in board.Scalars("loss/total"))

    def seen(self) -> Counter:
        """How often each image went into the weights: of a step that was done again, the last time counts."""
        last: dict[tuple[int, int], list[str]] = {}
        for rank, path in enumerate(sorted(self.work.glob("seen-*.txt"))):
            for line in path.read_text().splitlines():
                step, *positions = line.split()
                last[rank, int(step)] = positions
        return Counter(position for positions in last.values() for position in positions)

    def summary(self) -> str:
        return (self.folder / "results" / "demo" / "summary.csv").read_text()

    def jobs(self, *options: str) -> list[tuple[str, ...]]:
        """Partition, account and state of the jobs of one process of this Snakemake, which all have its name."""
        name = self.said().split("SLURM run ID: ", 1)[1].split()[0]
        command = ["sacct", "-nPX", "--starttime=now-1days", f"--name={name}", "--format=partition,account,state"]
        return [tuple(line.split("|")) for line in slurm(*command, *options).splitlines()]

    def jobs_of_pretraining(self) -> int:
        """Jobs that Slurm's accounting has of the pretraining; a requeued one counts once."""
        name = next(self.work.glob("launch/001/*_submission.sh")).read_text().split("--job-name=", 1)[1].split()[0]
        return len(slurm("sacct", "-nPX", f"--name={name}", "--format=JobID").split())


def assert_same(run: Demo, whole: Demo, requeues: int | None = None) -> None:
    """The weights and the summary of the undisturbed run, every image seen as often, each step once in the logs."""
    mine, other = run.weights(), whole.weights()
    assert mine.keys() == other.keys()
    for path, weights in mine.items():
        assert is_same(weights, other[path]), path
    assert run.summary() == whole.summary()
    assert run.seen() == whole.seen()
    assert run.history() == whole.history()
    assert run.board() == [step for step, _ in whole.history()]
    if requeues is not None:
        assert run.starts()[-1]["restart"] == requeues
        assert run.jobs_of_pretraining() == 1
    assert not list(run.work.glob("*.lease"))
    assert not (run.work / "job.json").exists()
