"""Early-learning regularisation: keep near to what the network has said of an image so far.

Source: Liu et al., NeurIPS 2020, arXiv 2007.00151; the constants are those of their code, github.com/shengliu66/ELR.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, optim
from torch.nn import functional

from medmask.methods.base import Batch, Clock, Method, Ranks, StepOutput

LEAST = 1e-4  # probabilities are kept between this and 1 minus this


class ELR(Method):
    """Cross-entropy plus `strength` times the mean of log(1 - <t, p>), t a running mean of an image's predictions p."""

    memory_targets: Tensor

    def setup(self, data: Any, ctx: Ranks, optimizers: Mapping[str, optim.Optimizer]) -> None:
        super().setup(data, ctx, optimizers)
        self.keep("targets", torch.zeros(len(data.train.labels), data.n_classes))

    def training_step(self, batch: Batch, clock: Clock) -> StepOutput:
        logits = self.network(batch.images)
        probs = logits.softmax(1).clamp(LEAST, 1 - LEAST)
        targets = renewed(self.memory_targets[self.rows(batch)], probs.detach(), self.cfg.memory)
        self.remember(batch, predicted=logits.argmax(1), targets=targets)
        regulariser = early_learning(targets, probs).mean()
        loss = functional.cross_entropy(logits, batch.labels) + self.cfg.strength * regulariser
        return StepOutput(loss, {"loss/regulariser": regulariser})


def renewed(targets: Tensor, probs: Tensor, memory: float) -> Tensor:
    """The running means (N, K) after the predictions (N, K) of a step, whose rows are made to sum to 1."""
    return memory * targets + (1 - memory) * probs / probs.sum(1, keepdim=True)


def early_learning(targets: Tensor, probs: Tensor) -> Tensor:
    """log(1 - <t, p>) of each example, (N,)."""
    return (1 - (targets * probs).sum(1)).log()
