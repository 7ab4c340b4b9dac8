"""The processes of a training run, and what they agree on."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from medmask.errors import LaunchError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What the ranks found together at a step: any of them is enough."""

    not_finite: bool = False
    stop: bool = False
    save: bool = False


@dataclass
class DistContext:
    """This process among all of a run; one process needs no launcher."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    asked: Tensor | None = None
    work: dist.Work | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, loss: Tensor, stop: bool, save: bool) -> Verdict:
        """Start to ask all ranks about this step; return the answer about the step before.

        Reading a step later keeps a GPU from waiting, and all ranks read the same answer at the same step.
        """
        verdict = self.answer()
        told = torch.tensor([stop, save], dtype=torch.float32, device=loss.device)
        self.asked = torch.cat([(~torch.isfinite(loss.detach())).float().view(1), told])
        if self.world > 1:
            self.work = dist.all_reduce(self.asked, dist.ReduceOp.MAX, async_op=True)
        return verdict

    def answer(self) -> Verdict:
        """Wait for the answer to the last `agree`."""
        if self.asked is None:
            return Verdict()
        if self.work is not None:
            self.work.wait()
        values = [value > 0 for value in self.asked.tolist()]
        self.asked = self.work = None
        return Verdict(*values)

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the ranks."""
        if self.world == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world

    def share(self, n: int) -> slice:
        """This rank's contiguous part of n things; each thing is in exactly one part."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def gather(self, values: np.ndarray, n: int) -> np.ndarray:
        """Put the ranks' values of their `share(n)` together; (own, K) to (n, K) float64, the same on all ranks."""
        whole = torch.zeros((n, *values.shape[1:]), dtype=torch.float64, device=self.device)
        whole[self.share(n)] = torch.from_numpy(np.asarray(values, dtype=np.float64)).to(self.device)
        if self.world > 1:
            dist.all_reduce(whole)  # all but one rank hold zeros: exact
        return whole.cpu().numpy()

    def gather_rows(self, values: Tensor, most: int) -> Tensor:
        """The ranks' tensors (own, ...) as one of (ranks, most, ...); what a rank lacks of `most` is NaN."""
        whole = values.new_full((most, *values.shape[1:]), float("nan"))
        whole[: len(values)] = values
        if self.world == 1:
            return whole[None]
        parts = [torch.empty_like(whole) for _ in range(self.world)]
        dist.all_gather(parts, whole)
        return torch.stack(parts)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def distributed(wants_gpu: bool, environ: Mapping[str, str] = os.environ) -> Iterator[DistContext]:
    """Join the run that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* name, as torchrun and the launcher set them."""
    rank, world, local = (read_number(environ, *item) for item in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = choose_device(wants_gpu, local)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if world == 1:
        yield DistContext(device=device)
        return
    if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
        raise LaunchError(f"WORLD_SIZE is {world} but MASTER_ADDR or MASTER_PORT is not set: start it with torchrun")
    if sys.platform == "linux" and environ["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a laptop's host name often has no address
    shares_gpu = device.type == "cuda" and read_number(environ, "LOCAL_WORLD_SIZE", 1) > torch.cuda.device_count()
    if shares_gpu:
        log.warning("more ranks than GPUs on this machine: they share, and talk through gloo")
    dist.init_process_group("nccl" if device.type == "cuda" and not shares_gpu else "gloo", rank=rank, world_size=world)
    try:
        yield DistContext(rank=rank, world=world, device=device)
    finally:
        dist.destroy_process_group()


def choose_device(wants_gpu: bool, local_rank: int) -> torch.device:
    if not (wants_gpu and torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def read_number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    if not text.isdigit():
        raise LaunchError(f"{name}: need a number, got {text!r}")
    return int(text)
