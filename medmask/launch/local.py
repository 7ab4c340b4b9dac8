"""Jobs on this machine: the same road as on a cluster, without one."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import submitit

from medmask import cli, io
from medmask.errors import ConfigError
from medmask.launch.job import Job, Options, Task, rank_file
from medmask.launch.rank import DEVICES, run_rank
from medmask.train.signals import STOP_AT, grace_seconds

DAYS_30 = 30 * 24 * 60
FAILED_SECONDS = 10


class Local:
    """Ranks as processes here; they outlive the launcher. A job's id is that of the process that watches them."""

    LIVE = frozenset({"RUNNING"})

    def submit(self, task: Task, options: Options, folder: Path) -> str:
        if options.nodes > 1:
            raise ConfigError("--nodes: one machine is one node; more need --cluster slurm")
        minutes = options.minutes or DAYS_30
        grace = grace_seconds(minutes)
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(tasks_per_node=options.ranks, timeout_min=minutes, signal_delay_s=grace)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        os.environ[STOP_AT] = str(time.time() + minutes * 60 - grace)
        if (devices := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            os.environ[DEVICES] = devices
        # Ctrl-C, and the end of a terminal, go to all its processes: only the launcher is to hear it, and to pass it on
        numbers = (signal.SIGINT, signal.SIGHUP)
        old = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
        try:
            return str(executor.submit(run_rank, task.command, str(task.finished)).job_id)
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def state(self, job: Job) -> str:
        """Whether the watching process lives, be it a child of this launcher or of an earlier one."""
        try:
            is_running = os.waitpid(int(str(job.job_id)), os.WNOHANG) == (0, 0)
        except ChildProcessError:
            is_running = belongs(int(str(job.job_id)), job)
        if is_running and has_failed(job):
            self.kill(job)
        return "RUNNING" if is_running else "ENDED"

    def find(self, name: str) -> list[str]:
        return []

    def stop(self, job: Job) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(str(job.job_id)), signal.SIGTERM)  # the watching process passes it on to all ranks

    def kill(self, job: Job) -> None:
        for rank in range(job.ranks):
            path = rank_file(Path(job.folder), rank)
            pid = io.read_json(path)["pid"] if path.exists() else 0
            if pid and belongs(pid, job):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def has_failed(job: Job) -> bool:
    """Whether a rank has ended badly a while ago; the others may wait for it for long."""
    for path in (rank_file(Path(job.folder), rank) for rank in range(job.ranks)):
        if path.exists() and io.read_json(path)["code"] not in (None, 0, cli.STOPPED):
            return time.time() - path.stat().st_mtime > FAILED_SECONDS
    return False


def belongs(pid: int, job: Job) -> bool:
    """Whether a process is one of a job's: its command line names the job's folder."""
    try:
        return job.folder.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
