"""Being told to stop: a signal sets a flag, or the time is up, and the training loop looks at it."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
STOP_AT = "MEDMASK_STOP_AT"  # seconds since 1970 at which a job is to save and stop, ahead of its time limit


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
    """Yield a flag that SIGTERM, SIGINT, SIGUSR2 and the time in MEDMASK_STOP_AT set; the handlers do nothing else."""
    text = environ.get(STOP_AT, "")
    flag = StopFlag(stop_at=float(text) if text.replace(".", "", 1).isdigit() else None)
    old = {}
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, flag.set) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
