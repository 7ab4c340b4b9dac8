"""Run a training stage as several processes: `python -m medmask.launch --ranks 2 --work-dir WORK -- STAGE ...`.

The job is one list of strings, the stage's command line; each rank exports the variables that torch reads and calls
`cli.main` with it. The launcher waits, shows the log of rank 0, and judges the end by the stage's own outputs, which
the job leaves in the work folder and the launcher puts in place. Started again, it finds the job that runs or has
ended. Exit codes are those of the stage: 0 done, 2 the user's mistake, 75 stopped with its state saved, or still
running, and the same command goes on; 1 anything else.
"""

import argparse
import contextlib
import logging
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from medmask import cli, io
from medmask.errors import LaunchError, MedmaskError
from medmask.launch.follow import LogView, tell_end_of_log
from medmask.launch.job import Cluster, Job, Options, Task, Unreachable, make_task
from medmask.launch.local import Local
from medmask.launch.queue import GONE, ending
from medmask.launch.slurm import Slurm
from medmask.train.lease import Lease
from medmask.train.signals import GRACE_SECONDS

log = logging.getLogger(__name__)
TICK_SECONDS = 1.0
CONFIRM_SECONDS = 5  # a job may look ended while its requeue is on its way
SETTLE_SECONDS = 10  # an sbatch whose launcher was killed may still be on its way
CLUSTERS: dict[str, Callable[[], Cluster]] = {"local": Local, "slurm": Slurm}
LOCAL_POLL_SECONDS, SLURM_POLL_SECONDS = 0.2, 30
ON_EXIT = {"local": "cancel", "slurm": "detach"}
AGAIN = ("TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", GONE)  # ends that are no fault of the run


def main(argv: Sequence[str] | None = None) -> int:
    """Launch a stage and wait for it; returns the exit code."""
    options, command = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s launch: %(message)s", datefmt="%H:%M:%S", force=True)
    try:
        return launch(options, command)
    except Unreachable as error:
        print(f"medmask launch: {error}; the same command goes on from here", file=sys.stderr)
        return cli.STOPPED
    except MedmaskError as error:
        print(f"medmask launch: error: {error}", file=sys.stderr)
        return 2


def parse(argv: Sequence[str] | None) -> tuple[Options, list[str]]:
    parser = argparse.ArgumentParser("medmask.launch", description="Run a training stage as several processes.")
    parser.add_argument("--cluster", choices=sorted(CLUSTERS), default="local", help="where (local)")
    parser.add_argument("--ranks", type=int, required=True, help="processes")
    parser.add_argument("--work-dir", type=Path, required=True, help="folder of the run: its checkpoints and logs")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of all ranks together; 0: CPU only (0)")
    parser.add_argument("--cpus-per-rank", type=int, default=1, help="cores of a rank (1)")
    parser.add_argument("--mem-mb", type=int, help="memory of all ranks together, MB")
    parser.add_argument("--minutes", type=float, help="time limit of one job; needed on Slurm")
    parser.add_argument("--nodes", type=int, default=1, help="nodes that share the ranks evenly (1)")
    parser.add_argument("--partition", help="Slurm's")
    parser.add_argument("--account", help="Slurm's")
    parser.add_argument("--max-requeues", type=int, default=20, help="new starts after time limits and faults (20)")
    parser.add_argument("--on-exit", choices=("detach", "cancel"), help="what Ctrl-C and SIGTERM do to the job: leave "
                        "it to itself (slurm), or have it save and end (local)")  # fmt: skip
    parser.add_argument("--poll-seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- STAGE ...", help="a stage and its flags")
    args = vars(parser.parse_args(argv))
    command = args.pop("command")[1:] if args["command"][:1] == ["--"] else args.pop("command")
    positive = (args["ranks"], args["nodes"], args["cpus_per_rank"], 1 if args["minutes"] is None else args["minutes"])
    if not command or min(positive) <= 0 or min(args["gpus"], args["max_requeues"]) < 0:
        parser.error("need a stage after `--`, at least one rank, node and core, and a positive time limit")
    is_local = args["cluster"] == "local"
    args["on_exit"] = args["on_exit"] or ON_EXIT[args["cluster"]]
    args["poll_seconds"] = args["poll_seconds"] or (LOCAL_POLL_SECONDS if is_local else SLURM_POLL_SECONDS)
    return Options(**args), command


def launch(options: Options, command: list[str]) -> int:
    """Bring a stage to its end: submit it, or find its job, and follow that; submit again what a cluster ended."""
    task = make_task(options, command)
    cluster = CLUSTERS[options.cluster]()
    lost: list[bool] = []
    lease = Lease(options.work_dir / "launcher.lease", "waiting for the job", lambda: lost.append(True))
    with stop_signals() as told, lease:
        for n in range(options.max_requeues + 1):
            if n == 0 and task.is_finished():
                log.info("a job had finished this run; putting its outputs in place")
                task.publish()
                job_file(options).unlink(missing_ok=True)
                return 0
            job, is_new = find(options, cluster, task)
            if told:
                return cli.STOPPED
            job = job or submit(options, cluster, task)
            state = follow(job, cluster, options, task, told, LogView(job, is_new))
            if state == "LEFT":
                return cli.STOPPED
            lease.check()
            code = judge(job, state, options, task, bool(told))
            job_file(options).unlink(missing_ok=True)
            if told or not (code == cli.STOPPED and goes_on(job, state)):
                return code
            log.info("submitting it again")
    return cli.STOPPED


def goes_on(job: Job, state: str) -> bool:
    """Whether a job that did not finish is worth a new one; on Slurm it has requeued itself where it could."""
    return state in AGAIN or state == "ENDED"


def submit(options: Options, cluster: Cluster, task: Task) -> Job:
    attempts = options.work_dir / "launch"
    folder = attempts / f"{len(list(attempts.glob('*'))) + 1:03d}"  # one folder a job: no log is overwritten
    folder.mkdir(parents=True, mode=0o700)  # the folder holds pickles, which are code for who loads them
    (options.work_dir / "refused").unlink(missing_ok=True)
    shutil.rmtree(task.finished.parent, ignore_errors=True)
    host, began = socket.gethostname(), time.time()
    job = Job(options.cluster, task.name, None, str(folder.resolve()), options.ranks, host, began)
    io.write_json(job_file(options), asdict(job))  # so that a launcher that comes after this one knows of the attempt
    try:
        job_id = cluster.submit(task, options, folder)
    except MedmaskError:
        job_file(options).unlink()
        raise
    job = Job(**{**asdict(job), "job_id": job_id})
    io.write_json(job_file(options), asdict(job))
    log.info("job %s (%s): %d ranks, logs in %s", job_id, task.name, options.ranks, folder)
    return job


def find(options: Options, cluster: Cluster, task: Task) -> tuple[Job | None, bool]:
    """The job of an earlier launcher that waits or runs, if there is one; and whether one is still to be submitted."""
    path = job_file(options)
    job = Job(**io.read_json(path)) if path.exists() else None
    if job and job.cluster != options.cluster:
        raise LaunchError(f"{path}: job {job.job_id} was started with --cluster {job.cluster}; use that, or delete it")
    if job and job.cluster == "local" and job.host != socket.gethostname():
        raise LaunchError(f"{path}: job {job.job_id} was started on {job.host}; go on there, or delete it")
    if job and job.job_id:
        if (state := cluster.state(job)) in cluster.LIVE:
            if job.name != task.name:
                raise LaunchError(f"{path}: job {job.job_id} trains here with other settings; cancel it, or wait")
            log.info("following job %s, which is %s", job.job_id, state)
            return job, False
        log.info("%s", ending(job, state, options))
    ids = cluster.find(task.name)
    if not ids and job and not job.job_id and options.cluster != "local":
        time.sleep(SETTLE_SECONDS)
        ids = cluster.find(task.name)
    if not ids:
        return None, True
    folders = sorted((options.work_dir / "launch").glob("*"))
    folder = job.folder if job else str(folders[-1].resolve() if folders else options.work_dir / "launch")
    job = Job(options.cluster, task.name, ids[0], folder, options.ranks, socket.gethostname(), time.time())
    io.write_json(path, asdict(job))
    log.info("following job %s, found by its name %s", job.job_id, task.name)
    return job, False


def job_file(options: Options) -> Path:
    return options.work_dir / "job.json"


def follow(job: Job, cluster: Cluster, options: Options, task: Task, told: list[int], view: LogView) -> str:
    """Wait for a job; returns its last state, FINISHED when its outputs stand, LEFT when it was left to itself."""
    state, asked_at, over_at, kill_at = "", -1e9, 0.0, float("inf")
    while True:
        now = time.monotonic()
        is_hurried = over_at > 0 or kill_at < float("inf")
        if now - asked_at >= (min(TICK_SECONDS, options.poll_seconds) if is_hurried else options.poll_seconds):
            new, asked_at = cluster.state(job), now
            if new != state and options.cluster != "local":
                log.info("job %s: %s", job.job_id, new)
            state = new
        over_at = 0.0 if state in cluster.LIVE else over_at or now
        is_over = over_at > 0 and (now - over_at >= CONFIRM_SECONDS or options.cluster == "local")
        view.show(is_last=is_over or task.is_finished())
        if task.is_finished():
            return "FINISHED"
        if is_over:
            return state
        if told and kill_at == float("inf"):
            if options.on_exit == "detach":
                tell_how_to_return(job)
                return "LEFT"
            log.info("told to stop: job %s is to save its state and end", job.job_id)
            cluster.stop(job)
            kill_at = now + GRACE_SECONDS
        if now > kill_at or len(told) > 2:
            cluster.kill(job)
            told[2:] = []
            kill_at = now + GRACE_SECONDS
        time.sleep(min(TICK_SECONDS, options.poll_seconds))


def tell_how_to_return(job: Job) -> None:
    end = f"scancel {job.job_id}" if job.cluster == "slurm" else f"kill {job.job_id}"
    log.info("told to stop: job %s goes on; the same command follows it again, `%s` ends it", job.job_id, end)


def judge(job: Job, state: str, options: Options, task: Task, was_told: bool) -> int:
    """The exit code of a job that has ended; its outputs count, and nothing else makes it a success."""
    if task.is_finished():
        task.publish()
        return 0
    refused = options.work_dir / "refused"
    codes = [job.code_of(rank) for rank in range(job.ranks)]
    if refused.exists() and 2 in codes:
        reason = refused.read_text(encoding="utf-8").strip()
        if reason not in job.read_log(0):  # which has been shown
            print(f"medmask {task.stage}: error: {reason}", file=sys.stderr)
        return 2
    sentence = ending(job, state, options)
    if was_told or state in (*AGAIN, "CANCELLED") or cli.STOPPED in codes:
        if not was_told:
            log.info("%s", sentence)
        return cli.STOPPED
    print(f"medmask launch: error: {sentence}", file=sys.stderr)
    tell_end_of_log(job)
    return 1


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that SIGTERM, SIGINT and SIGHUP append to."""
    told: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    old = {number: signal.signal(number, lambda got, _: told.append(got)) for number in numbers}
    try:
        yield told
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
