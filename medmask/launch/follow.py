"""What a waiting launcher shows: the log of the first rank, its progress no more often than every few seconds."""

import contextlib
import re
import sys
import time

from medmask.launch.job import Job

PROGRESS_SECONDS = 5
PROGRESS = re.compile(rb"epoch \d+/\d+ step \d+/\d+ .* left$")
MOST_BYTES = 1 << 20  # of a log in one look
TAIL_LINES = 30


class LogView:
    """Copies new lines of a log to standard error.

    Parameters
    ----------
    is_new : False for a job that was found running: what its log held before is left out.
    """

    def __init__(self, job: Job, is_new: bool) -> None:
        self.job = job
        path = job.log_of(0)
        self.at = 0 if is_new or not path.exists() else path.stat().st_size
        self.progress = b""
        self.shown_at = 0.0

    def show(self, is_last: bool = False) -> None:
        """Copy what came since the last call; of the progress lines the newest one, when it is due."""
        path = self.job.log_of(0)
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self.at)
            text = file.read(MOST_BYTES)
        text = text[: text.rfind(b"\n") + 1]
        self.at += len(text)
        for line in text.splitlines():
            if PROGRESS.search(line):
                self.progress = line
            else:
                self.tell_progress(is_due=True)
                write(line)
        self.tell_progress(is_last or time.monotonic() - self.shown_at > PROGRESS_SECONDS)

    def tell_progress(self, is_due: bool) -> None:
        if not (is_due and self.progress):
            return
        n = self.job.requeues()
        write(self.progress + (f", requeued {n} time{'s' * (n > 1)}".encode() if n else b""))
        self.progress, self.shown_at = b"", time.monotonic()


def write(line: bytes) -> None:
    with contextlib.suppress(OSError):  # the terminal, or the reader of a pipe, may be gone
        sys.stderr.write(line.decode("utf-8", "replace") + "\n")
        sys.stderr.flush()


def tell_end_of_log(job: Job) -> None:
    """Show the last lines of the rank that failed: one that was killed, or whose error is not the loss of a peer."""
    codes = {rank: job.code_of(rank) for rank in range(job.ranks)}
    failed = next((r for r, code in codes.items() if code == 1), None)
    failed = next((r for r, code in codes.items() if code is None), 0) if failed is None else failed
    write(f"rank {failed} last wrote:".encode())
    for line in job.read_log(failed).splitlines()[-TAIL_LINES:]:
        write(f"  | {line}".encode())
