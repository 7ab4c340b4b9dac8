"""Batch norm over all ranks, with gradients of first order in both modes, on any device.

torch's SyncBatchNorm refuses CPU modules and has no forward-mode rule. Here one small collective brings the ranks'
counts, means and squared deviations together; its backward and its forward-mode rule are collectives too, and all
else is plain arithmetic that autograd knows.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from medmask.errors import ConfigError

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Gather(torch.autograd.Function):
    """(S,) of each rank to (R, S), the same on all ranks."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        return all_gather(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank()]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return all_gather(tangent)


def gather(values: Tensor) -> Tensor:
    """`Gather`, open to tensors of another kind, as those of `meta_gradient` that carry a tangent."""
    if has_torch_function_unary(values):
        return handle_torch_function(gather, (values,), values)
    return Gather.apply(values)


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose training statistics are those of all ranks' batches together, whatever their sizes."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        values = input if input.dtype == torch.float64 else input.float()
        count, mean, variance = global_statistics(values)
        self.update_running(count.detach(), mean.detach(), variance.detach())
        scale = torch.rsqrt(variance + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        spread = [1, -1] + [1] * (input.dim() - 2)
        return torch.addcmul(shift.view(spread), values, scale.view(spread)).to(input.dtype)

    def update_running(self, count: Tensor, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


def global_statistics(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean (C,) and biased variance (C,) of (N, C, ...) over all ranks.

    Squared deviations are combined, not sums of squares, which would cancel. Source: Chan et al., 1979.
    """
    own_variance, own_mean = torch.var_mean(values, [0, *range(2, values.dim())], correction=0)
    own_count = values.new_full((1,), values.numel() / values.shape[1])
    parts = gather(torch.cat([own_count, own_mean, own_variance]))  # (R, 1 + 2 C)
    shares, means, variances = parts.split([1, len(own_mean), len(own_mean)], dim=1)
    count = shares.sum()
    shares = shares / count
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean) ** 2)).sum(0)
    return count, mean, variance


def all_gather(values: Tensor) -> Tensor:
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.stack(parts)


def convert_batchnorm(module: nn.Module, device: torch.device, forward_mode: bool = False) -> None:
    """Replace every batch norm inside a module by one over all ranks; parameters and buffers stay the same objects.

    On a GPU it is torch's own, which is faster, unless forward mode is needed, which that lacks.
    """
    kind = nn.SyncBatchNorm if device.type == "cuda" and not forward_mode else GlobalBatchNorm
    for name, child in module.named_children():
        if type(child) in PLAIN:
            setattr(module, name, twin_of(child, kind))
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"sync_bn: cannot be had with layers of type {type(child).__name__}; set `sync_bn: false`"
            )
        else:
            convert_batchnorm(child, device, forward_mode)


def twin_of(child: Any, kind: type) -> nn.Module:
    twin = kind(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
    twin.weight, twin.bias = child.weight, child.bias
    twin.running_mean, twin.running_var = child.running_mean, child.running_var
    twin.num_batches_tracked = child.num_batches_tracked
    twin.training = child.training
    if hasattr(child, "is_frozen"):
        twin.is_frozen = child.is_frozen
    return twin


def share_statistics(module: nn.Module) -> None:
    """Give every rank the running statistics of rank 0: where ranks keep their own, its are the ones that count."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
    if not buffers:
        return
    values = torch.cat([buffer.flatten() for buffer in buffers])
    dist.broadcast(values, 0)
    for buffer, value in zip(buffers, values.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(value.view_as(buffer))
