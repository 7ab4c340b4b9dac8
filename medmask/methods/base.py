"""What a method gives to the training loop, and what it gets from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn


class Ranks(Protocol):
    """What a method may use of the processes that train it."""

    rank: int
    world: int
    device: torch.device


@dataclass(frozen=True)
class Clock:
    """Where the training is; `progress` runs from 0 at the first step to 1 after the last."""

    step: int
    step_in_epoch: int
    epoch: int
    progress: float


@dataclass(frozen=True)
class Batch:
    """A rank's share of a step.

    images (N, C, H, W) float32; labels (N,) int64, the labels to train on; positions (N,) int64, rows of the pack;
    true_labels (N,) only for a method with `needs_truth`; meta the trusted batch for one with `needs_meta_set`.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor
    true_labels: Tensor | None = None
    meta: "Batch | None" = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return self.map(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; torch's loader calls it when the device is a GPU."""
        return self.map(lambda value: value.pin_memory())

    def map(self, change: Callable[[Any], Any]) -> "Batch":
        """Apply a function to every tensor."""
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        changed: dict[str, Any] = {name: value if value is None else change(value) for name, value in values}
        return Batch(**changed)


@dataclass
class StepOutput:
    """`loss`: the scalar to minimise, a mean over the batch; `logs`: more scalars for the history."""

    loss: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class Method(nn.Module):
    """A way of training; concrete methods derive from this class and from nothing else.

    All state is a parameter, a buffer or `get_extra_state`, so that a checkpoint holds it.
    """

    needs_meta_set: ClassVar[bool] = False
    needs_truth: ClassVar[bool] = False

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Disjoint lists of the parameters to train, one optimizer a name."""
        raise NotImplementedError

    def training_step(self, batch: Batch, clock: Clock) -> StepOutput:
        """The loss of one batch; terms for different networks are summed and kept apart by `detach()`."""
        raise NotImplementedError

    def validation_step(self, batch: Batch) -> dict[str, Tensor]:
        """Numbers of each image, (N,): `loss`, and for classifiers `predicted`, the class."""
        raise NotImplementedError

    def predict(self, images: Tensor) -> Tensor:
        """Class probabilities, (N, K)."""
        raise NotImplementedError

    def export(self) -> dict[str, Tensor]:
        """The weights that a later stage loads, by the names of a `Classifier`."""
        raise NotImplementedError

    def before_epoch(self, data: Any, ctx: Ranks) -> None:
        """Called at the start of each epoch."""

    def after_step(self, clock: Clock, ctx: Ranks) -> None:
        """Called after each optimizer step."""

    def after_epoch(self, clock: Clock, ctx: Ranks) -> None:
        """Called after the last step of an epoch, before validation."""

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """The training step under the name that DistributedDataParallel wraps."""
        return self.training_step(batch, clock)
