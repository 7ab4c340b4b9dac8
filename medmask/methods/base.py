"""What a method gives to the training loop, and what it gets from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn, optim
from torch.nn import functional


class Ranks(Protocol):
    """What a method may use of the processes that train it."""

    rank: int
    world: int
    device: torch.device

    def gather_rows(self, values: Tensor, most: int) -> Tensor:
        """The ranks' tensors (own, ...) as one of (ranks, most, ...); what a rank lacks of `most` is NaN."""


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
        """Apply a function to every tensor, those of the trusted batch too."""
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        changed: dict[str, Any] = {
            name: value.map(change) if isinstance(value, Batch) else None if value is None else change(value)
            for name, value in values
        }
        return Batch(**changed)


@dataclass
class StepOutput:
    """`loss`: the scalar to minimise, a mean over the batch; `logs`: more scalars for the history.

    `skip`: () bool, the same on all ranks: where it is true the optimizers make no step.
    """

    loss: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)
    skip: Tensor | None = None


class Method(nn.Module):
    """A way of training; concrete methods derive from this class and from nothing else.

    All state is a parameter, a buffer or `get_extra_state`, so that a checkpoint holds it. What stands here in full is
    for methods around one classifier, their attribute `network`.
    """

    needs_meta_set: ClassVar[bool] = False
    needs_truth: ClassVar[bool] = False
    network: nn.Module
    cfg: Any
    row_of: Tensor | None = None  # row of the training side of each image of the pack; None before `setup`

    def __init__(self, network: nn.Module, cfg: Any) -> None:
        super().__init__()
        self.network, self.cfg = network, cfg

    def setup(self, data: Any, ctx: Ranks, optimizers: Mapping[str, optim.Optimizer]) -> None:
        """Called once before the training starts or goes on from a checkpoint.

        Parameters
        ----------
        data : `train`, `val` and `meta_set` with positions, labels and true labels (n,); `n_classes`; `teacher`, a
            network or None.
        optimizers : those of `param_groups`, by name.
        """
        self.ctx, self.optimizers = ctx, optimizers
        self.most = self.cfg.batch_size // ctx.world + 1  # images of a rank in a step
        positions = torch.from_numpy(data.train.positions)
        row_of = torch.full((int(positions.max()) + 1,), -1)
        row_of[positions] = torch.arange(len(positions))
        self.row_of = row_of.to(ctx.device)
        self.steps_taken: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.keep("predicted", torch.full((len(positions),), float("nan")))

    def keep(self, name: str, values: Tensor) -> None:
        """Add a memory by training image, (n, ...) float32: in checkpoints, after each step the same on all ranks."""
        self.register_buffer(f"memory_{name}", values.float().to(self.ctx.device))

    def memory(self) -> dict[str, Tensor]:
        """What is remembered of each training image, (n, ...), by name; NaN where nothing is yet."""
        start = "memory_"
        return {name.removeprefix(start): value for name, value in self.named_buffers() if name.startswith(start)}

    def remember(self, batch: Batch, **values: Tensor) -> None:
        """Note values of a batch's images, (N, ...), for the memories of these names."""
        if self.row_of is not None:
            kept = {name: value.detach().float() for name, value in values.items()}
            self.steps_taken.append((self.rows(batch), kept))

    def rows(self, batch: Batch) -> Tensor:
        """Rows of the training side of a batch's images, (N,)."""
        assert self.row_of is not None
        return self.row_of[batch.positions]

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Disjoint lists of the parameters to train, one optimizer a name."""
        return {"network": [p for p in self.network.parameters() if p.requires_grad]}

    def training_step(self, batch: Batch, clock: Clock) -> StepOutput:
        """The loss of one batch; terms for different networks are summed and kept apart by `detach()`."""
        raise NotImplementedError

    def validation_step(self, batch: Batch) -> dict[str, Tensor]:
        """Numbers of each image, (N,): `loss`, and for classifiers `predicted`, the class."""
        logits = self.network(batch.images)
        loss = functional.cross_entropy(logits, batch.labels, reduction="none")
        return {"loss": loss, "predicted": logits.argmax(1)}

    def predict(self, images: Tensor) -> Tensor:
        """Class probabilities, (N, K)."""
        return self.network(images).softmax(1)

    def export(self) -> dict[str, Tensor]:
        """The weights that a later stage loads, by the names of a `Classifier`."""
        return self.network.state_dict()

    def notes(self) -> list[str]:
        """Sentences for the record of the training."""
        return []

    def before_epoch(self, data: Any, ctx: Ranks) -> None:
        """Called at the start of each epoch."""

    def after_step(self, clock: Clock, ctx: Ranks) -> None:
        """Called after each optimizer step: put what the ranks have noted into the memories of all."""
        for rows, values in self.steps_taken:
            columns = [
                rows.double()[:, None],
                *(value.flatten(1).double() for value in map(as_columns, values.values())),
            ]
            table = torch.cat(columns, dim=1)
            if ctx.world > 1:
                table = ctx.gather_rows(table, self.most).flatten(0, 1)
                table = torch.where(table[:, :1].isnan(), table[:1], table)  # the first row again: written twice, equal
            start = 1
            for name, value in values.items():
                memory = getattr(self, f"memory_{name}")
                width = value[0].numel()
                memory[table[:, 0].long()] = table[:, start : start + width].float().view(-1, *memory.shape[1:])
                start += width
        self.steps_taken = []

    def after_epoch(self, clock: Clock, ctx: Ranks) -> None:
        """Called after the last step of an epoch, before validation."""

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """The training step under the name that DistributedDataParallel wraps."""
        return self.training_step(batch, clock)


def as_columns(value: Tensor) -> Tensor:
    return value[:, None] if value.dim() == 1 else value
