"""Numbered checkpoints of an unfinished training: written whole or not at all, checked when they are read."""

import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medmask import io
from medmask.config.base import Block
from medmask.errors import CheckpointError

log = logging.getLogger(__name__)
KEPT = 2
LAYOUT = 2  # raised when checkpoints of an older version cannot be gone on from


class Checkpointer:
    """The checkpoints of one run in a folder: `checkpoint-<step>.pt`, each with its digest in a `.sha256` beside it.

    Parameters
    ----------
    key : digest of all that determines the result; a checkpoint with another one is refused.
    check : called before a checkpoint is put in place; raises when this process may not write any more.
    """

    def __init__(self, folder: Path, key: str, check: Callable[[], None] = lambda: None) -> None:
        self.folder = Path(folder)
        self.key = key
        self.check = check

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint and drop all but the newest two."""
        path = self.folder / f"checkpoint-{step:09d}.pt"
        try:
            self.write(path, state)
        except (OSError, RuntimeError) as error:  # torch's writer turns the system's error into one of its own
            free = shutil.disk_usage(self.folder).free >> 20
            raise CheckpointError(
                f"{path}: cannot be written, {free} MB are free there: {str(error).splitlines()[0]}; the one before is "
                "kept, and the same command goes on from it"
            ) from error
        for old in self.paths()[:-KEPT]:
            remove(old)

    def write(self, path: Path, state: dict[str, Any]) -> None:
        with io.atomic_path(path) as part:
            torch.save({**state, "key": self.key}, part)
            digest = io.file_digest(part)
            self.check()
            with io.atomic_path(sidecar(path)) as text:  # first: a checkpoint without its digest counts as broken
                text.write_text(digest + "\n", encoding="utf-8")

    def load(self) -> dict[str, Any] | None:
        """The newest whole checkpoint, or None; a broken one is passed over with a warning."""
        paths = self.paths()[::-1]
        for number, path in enumerate(paths):
            try:
                state = read(path)
            except CheckpointError as error:
                older = paths[number + 1 : number + 2]
                instead = f"going on from {older[0]}" if older else "there is no older one: starting anew"
                log.warning("%s; %s", error, instead)
                continue
            if state["key"] != self.key:
                raise CheckpointError(
                    f"{path}: belongs to other settings or inputs; delete {self.folder} or use another --work-dir"
                )
            return state
        return None

    def paths(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(self.folder.glob("checkpoint-*.pt"))

    def clear(self) -> None:
        """Remove all checkpoints: the run has finished."""
        for path in self.paths():
            remove(path)


def read(path: Path) -> dict[str, Any]:
    """Read one checkpoint after checking its digest; no code in it is run."""
    expected = sidecar(path)
    if not expected.exists():
        raise CheckpointError(f"{path}: has no digest beside it")
    if io.file_digest(path) != expected.read_text(encoding="utf-8").strip():
        raise CheckpointError(f"{path}: damaged, its sha256 is not that of {expected.name}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: cannot be read: {type(error).__name__}") from error


def sidecar(path: Path) -> Path:
    return path.with_suffix(".sha256")


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    sidecar(path).unlink(missing_ok=True)


def fingerprint(cfg: Block, inputs: dict[str, Path | None]) -> str:
    """Digest of all that determines a training's result.

    Left out is how it is run: loading processes, what the job asks for, and the number of ranks where the batch
    norm is over all of them; and, as in keys, what has its default: a version with one key more goes on with the
    checkpoints of the one before.
    """
    left_out = {"workers", "needs", *({"ranks"} if getattr(cfg, "sync_bn", False) else ())}
    kept = cfg.model_dump(mode="json", exclude=left_out, exclude_defaults=True)
    digests = {name: None if path is None else io.file_digest(path) for name, path in inputs.items()}
    return io.digest({"settings": kept, "inputs": digests, "layout": LAYOUT})
