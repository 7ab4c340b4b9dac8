"""Generalised cross-entropy: between cross-entropy, which fits wrong labels, and absolute error, which learns slowly.

Source: Zhang and Sabuncu, NeurIPS 2018, arXiv 1805.07836. Differs: without the truncated form and its pruning.
"""

from torch import Tensor

from medmask.methods.base import Batch, Clock, Method, StepOutput


class GCE(Method):
    """Minimise the mean of (1 - p^q) / q, p the probability of the label given."""

    def training_step(self, batch: Batch, clock: Clock) -> StepOutput:
        logits = self.network(batch.images)
        self.remember(batch, predicted=logits.argmax(1))
        return StepOutput(generalised_cross_entropy(logits, batch.labels, self.cfg.q).mean())


def generalised_cross_entropy(logits: Tensor, labels: Tensor, q: float) -> Tensor:
    """(1 - p^q) / q of each example, (N,), from logits (N, K) and labels (N,)."""
    log_prob = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    return -(log_prob * q).expm1() / q
