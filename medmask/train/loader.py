"""Which images a step trains on, and their loading; a pure function of settings and step, not of ranks or workers."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from medmask.config.training import Training
from medmask.data.images import ImageReader
from medmask.errors import ConfigError
from medmask.methods.base import Batch, Method


@dataclass(frozen=True)
class Rows:
    """Images of one side of a split, by rows: (n,) int64 positions in the pack, labels, and true labels."""

    positions: np.ndarray
    labels: np.ndarray
    true_labels: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)


def no_rows() -> Rows:
    return Rows(*(np.empty(0, dtype=np.int64) for _ in range(3)))


@dataclass(frozen=True)
class TrainingData:
    """What a training reads: its own side, the side that chooses the best epoch, and the reader of all images.

    meta_set : the trusted images, with true labels. teacher : a network that classifies the training images.
    weights : (n,) float64, what each training image weighs in the loss, of mean 1; None where a method asks for none.
    """

    train: Rows
    val: Rows
    reader: ImageReader
    meta_set: Rows = field(default_factory=no_rows)
    n_classes: int = 0
    teacher: nn.Module | None = None
    weights: np.ndarray | None = None


class Plan:
    """The steps of an epoch: global batches, cut into parts (`accumulate`), each shared by all ranks.

    A leftover batch of one image is dropped, since batch norm has no statistics of it.
    """

    def __init__(self, cfg: Training, n: int, world: int) -> None:
        self.cfg, self.n, self.world = cfg, n, world
        self.steps = n // cfg.batch_size
        leftover = n % cfg.batch_size
        if leftover > 1 and not cfg.drop_last:
            self.steps += 1
        if n < 2 or self.steps == 0:
            raise ConfigError(f"batch_size: {n} training images give no batch of {cfg.batch_size}, with `drop_last` "
                              f"{cfg.drop_last}")  # fmt: skip
        for size in sorted({len(self.span(step)) for step in range(self.steps)}):
            self.check(size)

    def check(self, size: int) -> None:
        """Refuse before training a batch that some rank would have nothing, or no batch statistics, of."""
        least = max(2, self.world if self.cfg.sync_bn else 2 * self.world)
        smallest = min(part[1] - part[0] for part in self.parts(size))
        if smallest < least:
            which = "the last batch of an epoch" if size < self.cfg.batch_size else "a batch"
            raise ConfigError(
                f"batch_size: {which} has {size} images in {len(self.parts(size))} parts, but {self.world} ranks need "
                f"{least} images a part; set `drop_last: true`, or another `batch_size`, `accumulate` or `ranks`"
            )

    def span(self, step: int) -> range:
        """Places in the epoch's order of a step's batch."""
        start = step * self.cfg.batch_size
        return range(start, min(start + self.cfg.batch_size, self.n))

    def parts(self, size: int) -> list[tuple[int, int]]:
        """Bounds of the nearly equal parts of a batch; a small last batch has fewer parts."""
        n = min(self.cfg.accumulate, max(1, size // 2))
        return [(size * k // n, size * (k + 1) // n) for k in range(n)]

    def order(self, epoch: int) -> np.ndarray:
        """Rows in the order of an epoch, (n,)."""
        if self.cfg.order == "file":
            return np.arange(self.n)
        seed = [self.cfg.seed, epoch] if self.cfg.order == "reshuffled" else [self.cfg.seed]
        return np.random.default_rng(seed).permutation(self.n)

    def rows(self, order: np.ndarray, step: int, part: int, rank: int) -> np.ndarray:
        """Rows of one rank's contiguous slice of one part of a step's batch."""
        batch = order[self.span(step)[0] : self.span(step)[-1] + 1]
        low, high = self.parts(len(batch))[part]
        size = high - low
        return batch[low + size * rank // self.world : low + size * (rank + 1) // self.world]


class MetaPlan:
    """The trusted images of each step: the meta set in a random order, then in another one, and so on.

    Raises
    ------
    ConfigError : there is no meta set, or it has fewer images than a step needs.
    """

    def __init__(self, cfg: Any, n: int, rank: int) -> None:
        if n == 0:
            raise ConfigError(
                f"method: {cfg.method} needs trusted images and the split has none: set `meta_set` in its block of "
                "`splits`, for example {per_class: 10}"
            )
        if cfg.meta.size is not None and cfg.meta.size > n:
            raise ConfigError(f"meta.size: need at most the {n} images of the meta set, got {cfg.meta.size}")
        self.size, self.n = cfg.meta.size or n, n
        self.is_fixed = cfg.meta.refresh == "once"
        self.names = (*b"meta", *((rank,) if cfg.meta.scope == "rank" else ()))
        self.seed = cfg.seed

    def rows(self, step: int) -> tuple[np.ndarray, tuple[int, ...]]:
        """Rows (size,) of the meta set at a step, and the numbers that name the draw of their random changes."""
        step = 0 if self.is_fixed else step
        places = np.arange(step * self.size, (step + 1) * self.size)
        rounds = range(places[0] // self.n, places[-1] // self.n + 1)
        orders = [np.random.default_rng([self.seed, *self.names, round_]).permutation(self.n) for round_ in rounds]
        return np.concatenate(orders)[places - rounds[0] * self.n], (*self.names, step)


class Parts(Dataset):
    """Loads one part of a step; the key says which."""

    def __init__(self, plan: Plan, data: TrainingData, rank: int, method: Method | type[Method]) -> None:
        self.plan, self.data = plan, data
        self.rank, self.needs_truth = rank, method.needs_truth
        self.meta = MetaPlan(plan.cfg, len(data.meta_set), rank) if method.needs_meta_set else None
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, step, part = key
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.plan.order(epoch)
        rows = self.plan.rows(self.order, step, part, self.rank)
        batch = load(self.data.train, rows, self.data.reader, epoch, self.needs_truth)
        if self.meta is None:
            return batch
        trusted, names = self.meta.rows(epoch * self.plan.steps + step)
        return replace(batch, meta=load(self.data.meta_set, trusted, self.data.reader, names))


class Keys:
    """The keys of all parts from a step on to the end of training: skipping ahead loads nothing."""

    def __init__(self, plan: Plan, start: int) -> None:
        self.plan, self.start = plan, start

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for number in range(self.start, self.plan.steps * self.plan.cfg.epochs):
            epoch, step = divmod(number, self.plan.steps)
            for part in range(len(self.plan.parts(len(self.plan.span(step))))):
                yield epoch, step, part


def load(
    side: Rows, rows: np.ndarray, reader: ImageReader, epoch: int | tuple[int, ...] | None, needs_truth: bool = False
) -> Batch:
    """Read some rows of a side; with an epoch, or other numbers that name the draw, changed at random."""
    positions = side.positions[rows]
    return Batch(
        images=reader.batch(positions, epoch),
        labels=torch.from_numpy(side.labels[rows]),
        positions=torch.from_numpy(positions),
        true_labels=torch.from_numpy(side.true_labels[rows]) if needs_truth else None,
    )


def training_parts(parts: Parts, start: int, workers: int, pin: bool) -> Iterator[Batch]:
    """All parts from step `start` to the end of the last epoch, in order."""
    keys = Keys(parts.plan, start)
    if workers == 0:
        return (parts[key] for key in keys)
    return iter(
        DataLoader(
            parts, batch_size=None, sampler=keys, num_workers=workers, pin_memory=pin, worker_init_fn=ignore_signals
        )
    )


def ignore_signals(worker: int) -> None:
    """A signal to the whole process group is for the parent, which needs its workers until it has saved."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
