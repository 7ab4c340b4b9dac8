"""Supervised training: cross-entropy on the labels as they are."""

from torch.nn import functional

from medmask.methods.base import Batch, Clock, Method, StepOutput


class Supervised(Method):
    """Minimise the mean cross-entropy of one classifier."""

    def training_step(self, batch: Batch, clock: Clock) -> StepOutput:
        logits = self.network(batch.images)
        self.remember(batch, predicted=logits.argmax(1))
        return StepOutput(functional.cross_entropy(logits, batch.labels))
