"""Run a training stage as several processes: `python -m medmask.launch --ranks 2 --work-dir WORK -- STAGE ...`.

The job is one list of strings, the stage's command line; each rank exports the variables that torch reads and calls
`cli.main` with it. The launcher waits, shows the log of rank 0, and judges the end by the stage's own outputs. Exit
codes are those of the stage: 0 done, 2 the user's mistake, 75 stopped with its state saved, 1 anything else.
"""

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import submitit

from medmask import cli, io
from medmask.errors import ConfigError, LaunchError, MedmaskError

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2
TAIL_LINES = 30
GRACE_SECONDS = 60  # between the warning and the end of a time limit
DAYS_30 = 30 * 24 * 60
DEVICES = "MEDMASK_CUDA_VISIBLE_DEVICES"  # what the launcher sees: submitit's local executor hides all GPUs


@dataclass(frozen=True)
class Options:
    """How a job is run."""

    cluster: str
    ranks: int
    work_dir: Path
    timeout_min: float
    max_requeues: int


@dataclass(frozen=True)
class Job:
    """A job that was submitted; `job.json` in the work folder holds it, so that another launcher finds it."""

    cluster: str
    job_id: str
    folder: str
    ranks: int
    host: str
    submitted: float

    def log_of(self, rank: int) -> Path:
        """Standard error of a rank."""
        return submitit.core.utils.JobPaths(self.folder, self.job_id, rank).stderr

    def result_of(self, rank: int) -> int | None:
        """Exit code that a rank's stage returned, or None when it ended otherwise."""
        path = submitit.core.utils.JobPaths(self.folder, self.job_id, rank).result_pickle
        if not path.exists():
            return None
        outcome, value = submitit.core.utils.pickle_load(path)
        return value if outcome == "success" else None


@dataclass(frozen=True)
class Cluster:
    """What the launcher needs from a place where jobs run; Slurm is to be a second one."""

    submit: Callable[[list[str], Options, Path], str]
    is_running: Callable[[Job], bool]
    tell_to_stop: Callable[[Job], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Launch a stage and wait for it; returns the exit code."""
    options, command = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s launch: %(message)s", datefmt="%H:%M:%S", force=True)
    try:
        return launch(options, command)
    except MedmaskError as error:
        print(f"medmask launch: error: {error}", file=sys.stderr)
        return 2


def parse(argv: Sequence[str] | None) -> tuple[Options, list[str]]:
    parser = argparse.ArgumentParser("medmask.launch", description="Run a training stage as several processes.")
    parser.add_argument("--cluster", choices=sorted(CLUSTERS), default="local", help="where (local)")
    parser.add_argument("--ranks", type=int, required=True, help="processes")
    parser.add_argument("--work-dir", type=Path, required=True, help="folder of the run: its checkpoints and logs")
    parser.add_argument("--timeout-min", type=float, default=DAYS_30, help="time limit of one job, minutes")
    parser.add_argument("--max-requeues", type=int, default=3, help="new jobs after the time limit (3)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- STAGE ...", help="a stage and its flags")
    args = vars(parser.parse_args(argv))
    command = args.pop("command")[1:] if args["command"][:1] == ["--"] else args.pop("command")
    if not command or args["ranks"] < 1 or args["timeout_min"] <= 0:
        parser.error("need a stage after `--`, at least one rank, and a positive time limit")
    command = [*command, "--work-dir", str(args["work_dir"])] if "--work-dir" not in command else command
    return Options(**args), command


def launch(options: Options, command: list[str]) -> int:
    """Submit the command, or find it running, and follow it to its end; after a time limit submit it again."""
    check_command(command)
    (options.work_dir / "refused").unlink(missing_ok=True)
    cluster = CLUSTERS[options.cluster]
    with stop_flag() as told:
        for _ in range(options.max_requeues + 1):
            job = running_job(options, cluster) or submit(options, command, cluster)
            follow(job, cluster, told)
            job_file(options).unlink(missing_ok=True)
            code = judge(job, options, command, bool(told))
            if code != cli.STOPPED or told:
                return code
            log.info("the job has saved its state and stopped; submitting it again")
    return cli.STOPPED


def submit(options: Options, command: list[str], cluster: Cluster) -> Job:
    attempts = options.work_dir / "launch"
    folder = attempts / f"{len(list(attempts.glob('*'))) + 1:03d}"  # one folder an attempt: no log is overwritten
    folder.mkdir(parents=True, mode=0o700)  # the folder holds pickles, which are code for who loads them
    started = time.time()
    job_id = cluster.submit(command, options, folder)
    job = Job(options.cluster, job_id, str(folder.resolve()), options.ranks, socket.gethostname(), started)
    io.write_json(job_file(options), asdict(job))
    log.info("job %s: %d ranks, logs in %s", job_id, options.ranks, folder)
    return job


def running_job(options: Options, cluster: Cluster) -> Job | None:
    """The job of an earlier launcher that still runs."""
    if not job_file(options).exists():
        return None
    job = Job(**io.read_json(job_file(options)))
    if job.cluster == "local" and job.host != socket.gethostname():
        raise LaunchError(f"{job_file(options)}: job {job.job_id} was started on {job.host}; go on there, or delete it")
    if not cluster.is_running(job):
        return None
    log.info("following job %s, which still runs", job.job_id)
    return job


def job_file(options: Options) -> Path:
    return options.work_dir / "job.json"


def follow(job: Job, cluster: Cluster, told: list[int]) -> None:
    """Wait for a job, showing the log of rank 0; when told to stop, tell the job to save and stop."""
    shown, has_passed_on = 0, False
    while True:
        is_running = cluster.is_running(job)
        shown = show(job.log_of(0), shown)
        if not is_running:
            return
        if told and not has_passed_on:
            has_passed_on = True
            log.info("told to stop: job %s is saving its state", job.job_id)
            cluster.tell_to_stop(job)
        time.sleep(POLL_SECONDS)


def show(path: Path, start: int) -> int:
    """Copy whole new lines of a log to standard error; returns the place up to which they were shown."""
    if not path.exists():
        return start
    with path.open("rb") as file:
        file.seek(start)
        text = file.read()
    text = text[: text.rfind(b"\n") + 1]
    sys.stderr.write(text.decode("utf-8", "replace"))
    sys.stderr.flush()
    return start + len(text)


def judge(job: Job, options: Options, command: list[str], was_told: bool) -> int:
    """The exit code of a job that has ended; its outputs count, and never the result that it left alone."""
    refused = options.work_dir / "refused"
    if refused.exists():
        reason = refused.read_text(encoding="utf-8").strip()
        if reason not in read_log(job, 0):  # which has been shown
            print(f"medmask {command[0]}: error: {reason}", file=sys.stderr)
        return 2
    if has_outputs(command, job.submitted):
        return 0
    results = [job.result_of(rank) for rank in range(job.ranks)]
    if cli.STOPPED in results or was_told:
        return cli.STOPPED
    failed = next((rank for rank, code in enumerate(results) if code is None), 0)
    print(
        f"medmask launch: error: job {job.job_id} ended without its outputs; rank {failed} last wrote:", file=sys.stderr
    )
    for line in read_log(job, failed).splitlines()[-TAIL_LINES:]:
        print(f"  | {line}", file=sys.stderr)
    return 1


def read_log(job: Job, rank: int) -> str:
    path = job.log_of(rank)
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def check_command(command: list[str]) -> argparse.Namespace:
    """The parsed flags of a training stage; its settings are checked here, before any process is started."""
    if command[0] not in cli.STAGES or not getattr(stage := cli.stage_module(command[0]), "TRAINS", False):
        raise ConfigError(f"medmask.launch: need a training stage after `--`, got {command[0]!r}")
    parser = argparse.ArgumentParser(f"medmask {command[0]}")
    cli.add_stage_arguments(parser, stage)
    args = parser.parse_args(command[1:])
    cli.parse_settings(args.config, stage.CONFIG, command[0])
    return args


def has_outputs(command: list[str], since: float) -> bool:
    """Whether all outputs of a stage stand; the one that is moved into place last newer than `since`."""
    args = check_command(command)
    paths = [getattr(args, name) for name in cli.stage_module(command[0]).OUTPUTS]
    return all(path.exists() for path in paths) and paths[-1].stat().st_mtime >= since


@contextlib.contextmanager
def stop_flag() -> Iterator[list[int]]:
    """Yield a list that SIGTERM and SIGINT append to."""
    told: list[int] = []
    old = {number: signal.signal(number, lambda got, _: told.append(got)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run_rank(command: list[str]) -> int:
    """What each process of the job runs; returns the exit code of the stage."""
    place = submitit.JobEnvironment()
    os.environ.update(
        RANK=str(place.global_rank),
        LOCAL_RANK=str(place.local_rank),
        WORLD_SIZE=str(place.num_tasks),
        LOCAL_WORLD_SIZE=str(place.num_tasks // place.num_nodes),
    )
    os.environ.setdefault("MASTER_ADDR", place.hostnames[0])
    if (devices := os.environ.pop(DEVICES, None)) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    else:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    logging.getLogger("submitit").setLevel(logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGUSR2):  # submitit's handlers requeue by themselves; the stage has its own
        signal.signal(number, signal.SIG_DFL)
    return cli.main(command)


def submit_locally(command: list[str], options: Options, folder: Path) -> str:
    """Start the ranks on this machine; they outlive the launcher. Returns the id of the process that watches them."""
    seconds = options.timeout_min * 60
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(
        tasks_per_node=options.ranks,
        timeout_min=options.timeout_min,
        signal_delay_s=int(min(GRACE_SECONDS, seconds / 2)),
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if (devices := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        os.environ[DEVICES] = devices
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal: only the launcher
    try:  # is to hear it, and to pass it on as a request to save
        return str(executor.submit(run_rank, command).job_id)
    finally:
        signal.signal(signal.SIGINT, old)


def is_running_locally(job: Job) -> bool:
    """Whether the watching process lives, be it a child of this launcher or of an earlier one."""
    try:
        return os.waitpid(int(job.job_id), os.WNOHANG) == (0, 0)
    except ChildProcessError:
        line = Path(f"/proc/{job.job_id}/cmdline")
        return line.exists() and job.folder.encode() in line.read_bytes()


def stop_locally(job: Job) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(job.job_id), signal.SIGTERM)  # the watching process passes it on to all ranks


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


CLUSTERS = {"local": Cluster(submit_locally, is_running_locally, stop_locally)}

if __name__ == "__main__":
    from medmask import launch as module  # not `__main__`, whose functions would be pickled as code

    sys.exit(module.main())
