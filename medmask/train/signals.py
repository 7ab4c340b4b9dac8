"""Being told to stop: a signal sets a flag, and the training loop looks at it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


@dataclass
class StopFlag:
    """Whether this process has been told to stop."""

    is_set: bool = False

    def set(self, number: int, frame: Any) -> None:
        self.is_set = True


@contextlib.contextmanager
def watch_signals() -> Iterator[StopFlag]:
    """Yield a flag that SIGTERM, SIGINT and SIGUSR2 set; the handlers do nothing else."""
    flag = StopFlag()
    old = {}
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, flag.set) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
