"""The right to write in a folder, held by one process at a time. Imports no torch.

A lease is a file made with O_EXCL that says who holds it; its holder touches it every few seconds. File locks are not
used: they are often off on the shared file systems of clusters.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medmask.errors import LaunchError, Stopped
from medmask.train.signals import StopFlag

log = logging.getLogger(__name__)
BEAT_SECONDS = 5
STALE_SECONDS = 60  # a holder elsewhere that was not seen to touch its lease for so long is dead
GLANCE_SECONDS = 0.5


class Lease:
    """Hold `path` while the `with` block runs.

    Parameters
    ----------
    path : of the lease; its folder is the one that is held.
    does : what the holder does there, for the message to others: "training".
    lost : called in a thread when another process has taken the lease.
    job, restart : Slurm's id of the job and how often it was requeued; a later start of a job replaces an earlier one,
        of which some processes may still run on a node that Slurm has lost sight of.
    stop : given, wait for the end of a holder in another job, until this is set.

    Raises
    ------
    LaunchError : another process holds it and lives. Stopped : told to stop while waiting.
    """

    def __init__(
        self, path: Path, does: str, lost: Callable[[], None], job: str = "", restart: int = 0,
        stop: StopFlag | None = None,
    ) -> None:  # fmt: skip
        self.path, self.does, self.lost = Path(path), does, lost
        mine = {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid(), "since": start_of(os.getpid())}
        self.mine = {**mine, "job": job, "restart": restart, "does": does, "token": uuid.uuid4().hex}
        self.text = json.dumps(self.mine)
        self.ended = threading.Event()
        self.stop = stop
        self.said: set[str] = set()

    def __enter__(self) -> "Lease":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self.create():
            text, beat = look(self.path)
            if text is None:
                continue
            if not self.is_alive(text, beat):
                self.remove(text)
                continue
            if self.stop is None or parse(text).get("job") in (None, "", self.mine["job"]):
                raise LaunchError(f"{self.path.parent}: {describe(text)}; wait for its end, or stop it")
            self.say(f"{self.path.parent}: {describe(text)}; waiting for its end")
            self.pause(text)
        threading.Thread(target=self.beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.remove(self.text)

    def is_held(self) -> bool:
        return look(self.path)[0] == self.text

    def check(self) -> None:
        """Refuse to go on when the lease was lost."""
        text, _ = look(self.path)
        if text != self.text:
            raise LaunchError(f"{self.path.parent}: no longer ours to write in; {describe(text)}")

    def create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(self.text)
        return True

    def remove(self, text: str) -> None:
        """Remove the lease if it still is the one with this text; of two that try, one does it."""
        aside = self.path.with_name(f".{self.path.name}-{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            if look(self.path)[0] != text:
                return
            self.path.rename(aside)
            if aside.read_text() != text:  # somebody has taken it in between: put it back
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def is_alive(self, text: str, beat: int) -> bool:
        """Whether the holder lives: asked of the system on the same machine, else seen by its touches."""
        holder = parse(text)
        if holder.get("machine") == self.mine["machine"] and start_of(holder["pid"]) != holder["since"]:
            return False
        if holder.get("job") and holder["job"] == self.mine["job"] and holder["restart"] < self.mine["restart"]:
            return False
        if holder.get("machine") == self.mine["machine"]:
            return True
        end = time.monotonic() + STALE_SECONDS
        self.say(f"{self.path.parent}: {describe(text)}; looking whether it lives")
        while time.monotonic() < end:
            self.pause(text)
            if (now := look(self.path)) != (text, beat):
                return now[0] == text  # with another text, or none, there is a new holder to look at
        return False

    def pause(self, text: str) -> None:
        if self.stop is not None and self.stop.is_set:
            raise Stopped(f"{self.path.parent}: {describe(text)}; told to stop while waiting for it")
        time.sleep(GLANCE_SECONDS)

    def say(self, sentence: str) -> None:
        """Log something once."""
        if sentence not in self.said:
            log.info("%s", sentence)
            self.said.add(sentence)

    def beat(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a file system that does not answer for a while
                if self.is_held():
                    os.utime(self.path)
                elif not self.ended.is_set():
                    self.lost()
                    return


def writer(work_dir: Path, stop: StopFlag, environ: Mapping[str, str] = os.environ) -> Lease:
    """The lease of the one process that writes in a run's folder; the process ends at once when it is lost.

    A training of one process in a Slurm job waits for that of another job: Snakemake, started anew after it was killed,
    submits what still runs a second time. Several ranks do not wait, since the launcher finds its job again.
    """

    def end() -> None:
        log.error("%s: another process trains here now; this one ends without writing anything more", work_dir)
        os._exit(1)

    restart = environ.get("SLURM_RESTART_COUNT", "0")
    job = environ.get("SLURM_JOB_ID", "")
    waits = bool(job) and environ.get("WORLD_SIZE", "1") == "1"
    path, number = work_dir / "writer.lease", int(restart) if restart.isdigit() else 0
    return Lease(path, "training", end, job, number, stop if waits else None)


def look(path: Path) -> tuple[str | None, int]:
    """Text and time of the last touch (ns) of a lease; opened anew, so that a network file system asks its server."""
    try:
        with path.open() as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None, 0


def parse(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except ValueError:
        return {}  # just being written, or its writer was killed: its touches tell


def describe(text: str | None) -> str:
    holder = parse(text or "")
    if not holder:
        return "another process holds it"
    of_job = f" of job {holder['job']}" if holder["job"] else ""
    return f"process {holder['pid']}{of_job} on {holder['host']} is {holder['does']} here"


def machine() -> str:
    """What tells machines, and containers with processes of their own, apart; host names do not always."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return socket.gethostname()


def start_of(pid: int) -> str | None:
    """When a process started, None if there is none; a number that is used again is another process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
