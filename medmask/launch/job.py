"""What is launched, how, and where its files are: nothing here starts or asks anything."""

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from medmask import cli, io
from medmask.errors import ConfigError, LaunchError

PEER_LOST = 76  # exit code of a rank that is well when another one went away
NOT_DIGESTED = ("needs", "workers", "ranks")  # how a run is run: a live job is the same run with others


class Unreachable(LaunchError):
    """Slurm has not answered for long; nothing is lost."""


@dataclass(frozen=True)
class Options:
    """How a job is run: numbers are for all ranks together, except where the name says otherwise."""

    cluster: str
    ranks: int
    work_dir: Path
    gpus: int = 0
    cpus_per_rank: int = 1
    mem_mb: int | None = None
    minutes: float | None = None
    nodes: int = 1
    partition: str | None = None
    account: str | None = None
    max_requeues: int = 20
    on_exit: str | None = None
    poll_seconds: float = 30


@dataclass(frozen=True)
class Task:
    """One stage to be run.

    Parameters
    ----------
    name : `medmask-` and a digest of stage, settings, inputs and folder; the job is called so.
    command : the stage's command line, its outputs in `finished`.
    outputs : (where a job leaves it, where it belongs), in the order in which they are put in place.
    """

    name: str
    stage: str
    command: list[str]
    outputs: list[tuple[Path, Path]]

    @property
    def finished(self) -> Path:
        """The file that a job writes last."""
        return self.outputs[-1][0]

    def is_finished(self) -> bool:
        return all(path.exists() for path, _ in self.outputs)

    def publish(self) -> None:
        """Put the outputs of a finished job where they belong, one after the other, each at once."""
        folder = self.finished.parent
        pairs = [(folder / "config.json", self.outputs[0][1].with_name("config.json")), *self.outputs]
        for path, target in pairs:
            with io.atomic_path(target) as part:
                shutil.copyfile(path, part)
        for job in (folder.parent / "launch").glob("*"):
            (job / "done").touch()  # Slurm may still start one anew whose node it has lost sight of
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Job:
    """A job; `job.json` in the work folder holds it, so that another launcher finds it. No id: being submitted."""

    cluster: str
    name: str
    job_id: str | None
    folder: str
    ranks: int
    host: str
    submitted: float

    def log_of(self, rank: int) -> Path:
        """Standard error of a rank, as submitit names it."""
        return Path(self.folder) / f"{self.job_id}_{rank}_log.err"

    def read_log(self, rank: int) -> str:
        path = self.log_of(rank)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def code_of(self, rank: int) -> int | None:
        """Exit code of a rank's stage in the last start of the job; None when it was killed, or never began."""
        path = rank_file(Path(self.folder), rank)
        return io.read_json(path)["code"] if path.exists() else None

    def attempts(self) -> list[dict[str, Any]]:
        """Starts and ends of the job, oldest first, as its ranks and its script have written them."""
        path = Path(self.folder) / "attempts.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def requeues(self) -> int:
        return max((line["restart"] for line in self.attempts()), default=0)


class Cluster(Protocol):
    """What the launcher needs from a place where jobs run."""

    LIVE: frozenset[str]

    def submit(self, task: Task, options: Options, folder: Path) -> str: ...
    def state(self, job: Job) -> str: ...
    def find(self, name: str) -> list[str]: ...
    def stop(self, job: Job) -> None: ...
    def kill(self, job: Job) -> None: ...


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def note(folder: Path, **values: Any) -> None:
    """Append a line to the attempts of a job."""
    with (folder / "attempts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": round(time.time(), 2), **values}) + "\n")


def checkpoint_step(work_dir: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    return max((int(path.stem.rpartition("-")[2]) for path in work_dir.glob("checkpoint-*.pt")), default=0)


def make_task(options: Options, command: list[str]) -> Task:
    """Check the stage's flags, settings and inputs before any process is started, and name the run."""
    if command[0] not in cli.STAGES or not getattr(stage := cli.stage_module(command[0]), "TRAINS", False):
        raise ConfigError(f"medmask.launch: need a training stage after `--`, got {command[0]!r}")
    parser = argparse.ArgumentParser(f"medmask {command[0]}")
    cli.add_stage_arguments(parser, stage)
    args = parser.parse_args([*command[1:], "--work-dir", str(options.work_dir)])
    settings = cli.parse_settings(args.config, stage.CONFIG, command[0]).model_dump(mode="json")
    inputs = {name: getattr(args, name) for name in (*stage.INPUTS, *stage.OPTIONAL)}
    missing = [f"{cli.flag(name)}: no such file: {path}" for name, path in inputs.items() if path and not path.exists()]
    if missing:
        raise ConfigError("\n  ".join(missing))
    # the split holds the digest of each image: the pixels need not be read again
    digests = {name: io.file_digest(path) for name, path in inputs.items() if path and name != "images"}
    kept = {name: value for name, value in settings.items() if name not in NOT_DIGESTED}
    run = {"stage": command[0], "settings": kept, "inputs": digests, "folder": str(options.work_dir.resolve())}
    digest = io.digest(run)[:12]
    folder = options.work_dir / f"finished-{digest}"
    targets = cli.targets_of(stage, args)
    finished = {name: folder / f"{name}{path.suffix}" for name, path in targets.items()}
    line = [*command, "--work-dir", str(options.work_dir)]
    line += [text for name, path in finished.items() for text in (cli.flag(name), str(path))]  # the last ones count
    return Task(f"medmask-{digest}", command[0], line, [(finished[name], path) for name, path in targets.items()])
