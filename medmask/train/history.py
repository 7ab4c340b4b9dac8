"""The numbers of a training run as JSON lines and TensorBoard events, and its progress on the screen."""

import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmask import io

log = logging.getLogger(__name__)
LINES_PER_EPOCH = 10
SECONDS_BETWEEN_LINES = 10


class History:
    """`history.jsonl` and `tensorboard/` in the work folder; a resumed run drops what came after its checkpoint.

    Parameters
    ----------
    step : of the checkpoint that the run goes on from; 0 starts anew.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = Path(folder) / "history.jsonl"
        kept = [line for line in read_lines(self.path) if line["step"] <= step] if step else []
        with io.atomic_path(self.path) as part:
            part.write_text("".join(to_line(line) for line in kept), encoding="utf-8")
        self.file = self.path.open("a", encoding="utf-8")
        board = Path(folder) / "tensorboard"
        if step == 0 and board.exists():
            shutil.rmtree(board)
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(board), purge_step=step + 1 if step else None)

    def write(self, **values: Any) -> None:
        """Append one line; numbers that are not finite become null."""
        line = {name: value if finite(value) else None for name, value in values.items()}
        self.file.write(to_line(line))
        self.file.flush()
        for name, value in line.items():
            if name not in ("step", "epoch") and value is not None:
                self.board.add_scalar(name, value, line["step"])

    def histogram(self, name: str, values: Any, step: int) -> None:
        """Show a distribution in TensorBoard."""
        self.board.add_histogram(name, values, step)

    def close(self) -> None:
        self.file.close()
        self.board.close()


def finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def to_line(value: dict[str, Any]) -> str:
    return json.dumps(value, allow_nan=False) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a history; a line that a crash has cut is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def is_logged(step_in_epoch: int, steps: int) -> bool:
    """About ten steps an epoch are logged, the last one always."""
    every = max(1, math.ceil(steps / LINES_PER_EPOCH))
    return (step_in_epoch + 1) % every == 0 or step_in_epoch + 1 == steps


class Progress:
    """Where the training is: a bar on a terminal; in a log a line an epoch, and one each ten seconds in between."""

    def __init__(self, epochs: int, total_steps: int, step: int, is_main: bool) -> None:
        self.epochs, self.total, self.first = epochs, total_steps, step
        self.started = self.told_at = time.monotonic()
        self.loss = self.speed = math.nan
        self.bar: Any = None
        if is_main and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"),
                TimeRemainingColumn(), console=Console(stderr=True),
            )  # fmt: skip
            self.task = self.bar.add_task("starting", total=total_steps, completed=step)
            self.bar.start()

    def step(self, epoch: int, step: int, loss: float, speed: float) -> None:
        """Show a logged interval; epoch counts from 1, `step` steps are done, speed in images a second."""
        self.loss, self.speed = loss, speed
        if self.bar is not None:
            text = f"epoch {epoch}/{self.epochs} loss {loss:.4f} {speed:.0f} images/s"
            self.bar.update(self.task, completed=step, description=text)
        elif time.monotonic() - self.told_at > SECONDS_BETWEEN_LINES:
            self.tell(epoch, step, "")

    def epoch(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        """Show the end of an epoch with its validation numbers."""
        text = "".join(f" val {name} {value:.4f}" for name, value in numbers.items())
        if self.bar is not None:
            self.bar.console.print(f"epoch {epoch}/{self.epochs} loss {self.loss:.4f}{text}", highlight=False)
        else:
            self.tell(epoch, step, text)

    def tell(self, epoch: int, step: int, text: str) -> None:
        self.told_at = time.monotonic()
        left = (self.told_at - self.started) / max(1, step - self.first) * (self.total - step)
        log.info("epoch %d/%d step %d/%d loss %.4f%s %.0f images/s %s left", epoch, self.epochs, step, self.total,
                 self.loss, text, self.speed, clock_text(left))  # fmt: skip

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
