"""Training after probable label errors were found: without them, or with weights. The audit is a stage of its own.

Source: Northcutt et al., JAIR 2021, arXiv 1911.00068; library cleanlab. Differs: an error found may also stay, with its
label's predicted probability as weight; classes are not reweighted for the examples that they lose.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, optim
from torch.nn import functional

from medmask.methods.base import Batch, Clock, Method, Ranks, StepOutput


class Confident(Method):
    """Minimise the mean cross-entropy, with `errors: reweight` each image's times its weight, which is never changed.

    Errors that are removed are no training images any more when the method is set up.
    """

    memory_weight: Tensor

    def setup(self, data: Any, ctx: Ranks, optimizers: Mapping[str, optim.Optimizer]) -> None:
        super().setup(data, ctx, optimizers)
        if self.cfg.errors == "reweight":
            n = len(data.train.labels)
            self.keep("weight", torch.ones(n) if data.weights is None else torch.from_numpy(data.weights))

    def training_step(self, batch: Batch, clock: Clock) -> StepOutput:
        logits = self.network(batch.images)
        self.remember(batch, predicted=logits.argmax(1))
        losses = functional.cross_entropy(logits, batch.labels, reduction="none")
        if self.cfg.errors == "reweight":
            losses = losses * self.memory_weight[self.rows(batch)]
        return StepOutput(losses.mean())
