"""Being told to stop: a signal sets a flag, or the time is up, and the training loop looks at it."""

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
STOP_AT = "MEDMASK_STOP_AT"  # seconds since 1970 at which a job is to save and stop, ahead of its time limit
GRACE_SECONDS = 120  # between the warning and the end of a time limit; less where the limit is short
ASK_SECONDS = 60


@dataclass
class StopFlag:
    """Whether this process has been told to stop, or is to stop by now."""

    told: bool = False
    stop_at: float | None = None

    @property
    def is_set(self) -> bool:
        return self.told or (self.stop_at is not None and time.time() >= self.stop_at)

    def set(self, number: int, frame: Any) -> None:
        self.told = True


@contextlib.contextmanager
def watch_signals(environ: Mapping[str, str] = os.environ) -> Iterator[StopFlag]:
    """Yield a flag that SIGTERM, SIGINT, SIGUSR2 and the time of `stop_time` set; the handlers do nothing else."""
    flag = StopFlag()
    old = {}
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, flag.set) for number in SIGNALS}
    try:
        flag.stop_at = stop_time(environ)
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def stop_time(environ: Mapping[str, str]) -> float | None:
    """When to save and stop, s since 1970: as MEDMASK_STOP_AT says, else ahead of the end of this Slurm job."""
    if text := environ.get(STOP_AT):
        return float(text) if text.replace(".", "", 1).isdigit() else None
    if "SLURM_JOB_ID" not in environ:
        return None
    start, end = job_times(environ)
    return None if start is None or end is None else end - grace_seconds((end - start) / 60)


def grace_seconds(minutes: float) -> int:
    """How long before its time limit a job saves and stops."""
    return int(min(GRACE_SECONDS, minutes * 60 / 4))


def job_times(environ: Mapping[str, str]) -> tuple[float | None, float | None]:
    """Start and end by the time limit of this Slurm job, s since 1970; None for what is not known or has no limit."""
    texts = [environ.get("SLURM_JOB_START_TIME", ""), environ.get("SLURM_JOB_END_TIME", "")]
    if not all(texts):  # older than Slurm 23.02
        command = ["squeue", "--noheader", f"--jobs={environ['SLURM_JOB_ID']}", "--format=%S %e"]
        try:
            done = subprocess.run(command, env={**environ, "SLURM_TIME_FORMAT": "%s"}, timeout=ASK_SECONDS,
                                  capture_output=True, text=True, check=True)  # fmt: skip
            texts = [*done.stdout.split(), "", ""]
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("squeue: %s; this job does not stop by itself ahead of its time limit", error)
    start, end = (float(text) if text.isdigit() else None for text in texts[:2])
    return start, end
