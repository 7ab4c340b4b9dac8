"""Jobs on a Slurm cluster, through submitit."""

import contextlib
import io as text_io
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from medmask.errors import ConfigError, LaunchError
from medmask.launch.job import Job, Options, Task, Unreachable
from medmask.launch.queue import LIVE, Queue, controller_state
from medmask.launch.rank import run_rank
from medmask.site import call
from medmask.train.signals import STOP_AT, grace_seconds

log = logging.getLogger(__name__)
INHERITED = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_")  # of a job that the launcher itself may run in
KEPT = ("SLURM_CONF",)
PASSING = (  # refusals that are over after a while
    "unable to contact", "timed out", "temporarily", "connection refused", "communication connection failure",
    "connect failure", "not responding", "zero bytes", "resource temporarily",
)  # fmt: skip
SUBMIT_SECONDS, PAUSE_SECONDS = 600, 10  # how long, and how often, a submission is tried


class Slurm:
    """One task a rank, requeued under its id until the stage is done."""

    LIVE = LIVE

    def __init__(self) -> None:
        self.queue = Queue()

    def submit(self, task: Task, options: Options, folder: Path) -> str:
        values = parameters(task, options, folder)
        end = time.monotonic() + SUBMIT_SECONDS
        while True:
            try:
                with clean_environment(), undisturbed(), contextlib.redirect_stderr(text_io.StringIO()):
                    executor = submitit.SlurmExecutor(folder)
                    executor.update_parameters(**values)
                    return str(executor.submit(run_rank, task.command, str(task.finished)).job_id)
            except (FailedJobError, FailedSubmissionError) as error:
                said = plain(str(error))
            except RuntimeError as error:
                raise LaunchError(f"--cluster slurm: {plain(str(error))}") from error
            if not any(text in said.lower() for text in PASSING):
                raise LaunchError(f"sbatch: {said}; {where(options)}")
            if time.monotonic() > end:
                raise Unreachable(f"sbatch: {said}; tried for {SUBMIT_SECONDS // 60} minutes")
            log.warning("sbatch: %s; trying again", said)
            time.sleep(PAUSE_SECONDS)
            if ids := self.find(task.name):  # it was taken, only the answer was lost
                return ids[0]
            for left in folder.glob("*.pkl"):
                left.unlink()

    def state(self, job: Job) -> str:
        return self.queue.state(str(job.job_id))

    def find(self, name: str) -> list[str]:
        """Ids of the jobs of this name that wait or run, oldest first."""
        end = time.monotonic() + SUBMIT_SECONDS
        while True:
            done = call("squeue", "--noheader", "--me", f"--name={name}", "--format=%A")
            if done.is_ok:
                return sorted(set(done.text.split()), key=int)
            if time.monotonic() > end:
                raise Unreachable(f"squeue: {done.text}; asked for {SUBMIT_SECONDS // 60} minutes")
            log.warning("squeue: %s; asking again", done.text)
            time.sleep(PAUSE_SECONDS)

    def stop(self, job: Job) -> None:
        """Have a running job save and end; take one that waits out of the queue."""
        (Path(job.folder) / "cancelled").touch()  # so that its script does not requeue it
        flags = ["--signal=USR2"] if controller_state(str(job.job_id))[0] == "RUNNING" else []
        call("scancel", *flags, str(job.job_id))

    def kill(self, job: Job) -> None:
        call("scancel", str(job.job_id))


def parameters(task: Task, options: Options, folder: Path) -> dict[str, object]:
    """What submitit is to write into the job's script."""
    if options.minutes is None:
        raise ConfigError("--minutes: needed with --cluster slurm: the time limit of one job")
    for name, value in (("ranks", options.ranks), ("gpus", options.gpus)):
        if value % options.nodes:
            raise ConfigError(f"--{name}: {value} cannot be shared evenly by {options.nodes} nodes")
    grace = grace_seconds(options.minutes)
    extra: dict[str, object] = {"requeue": True}
    if options.mem_mb is not None:
        extra["mem"] = f"{math.ceil(options.mem_mb / options.nodes)}M"
    values: dict[str, object] = {
        "job_name": task.name,
        "partition": options.partition,
        "account": options.account,
        "time": math.ceil(options.minutes),
        "nodes": options.nodes,
        "ntasks_per_node": options.ranks // options.nodes,
        "cpus_per_task": options.cpus_per_rank,
        "gpus_per_node": options.gpus // options.nodes or None,
        "signal_delay_s": grace,
        "wckey": None,
        "setup": setup(options.minutes, grace, folder),
        "teardown": teardown(options, folder),
        # not inherited from sbatch since Slurm 22.05 | one rank lost: all end | no limit while the first rank saves
        "srun_args": [f"--cpus-per-task={options.cpus_per_rank}", "--kill-on-bad-exit=1", "--wait=0"],
        "additional_parameters": extra,
    }
    return {name: value for name, value in values.items() if value is not None or name == "wckey"}


def setup(minutes: float, grace: int, folder: Path) -> list[str]:
    """Script before the ranks: when to stop; and the rank's function, where a launcher died before it was in place."""
    inside = shlex.quote(str(folder.resolve()))
    limit = math.ceil(minutes) * 60
    return [
        f"export {STOP_AT}=$(( ${{SLURM_JOB_END_TIME:-$(( $(date +%s) + {limit} ))}} - {grace} ))",
        f"ln {inside}/*.pkl {inside}/${{SLURM_JOB_ID}}_submitted.pkl 2>/dev/null || true",
    ]


def teardown(options: Options, folder: Path) -> list[str]:
    words = [
        sys.executable, "-m", "medmask.launch.after", "--folder", str(folder.resolve()),
        "--work-dir", str(options.work_dir.resolve()), "--max-requeues", str(options.max_requeues), "--code",
    ]  # fmt: skip
    return ["code=$?", f"{shlex.join(words)} $code", "exit $code"]


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """Hide the variables of a job that the launcher may run in: sbatch would take them for options."""
    names = [name for name in os.environ if name.startswith(INHERITED) and name not in KEPT]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep Ctrl-C and the like until sbatch has answered: else a job may be taken, and nobody know."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def where(options: Options) -> str:
    named = {"--partition": options.partition, "--account": options.account}
    given = ", ".join(f"{flag} {value or '(not given)'}" for flag, value in named.items())
    return f"asked with {given}, --nodes {options.nodes}, --minutes {options.minutes:g}"


def plain(text: str) -> str:
    """What sbatch printed, in one line."""
    lines = [line.strip().removeprefix("sbatch: ").removeprefix("error: ") for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "failed without a word"
