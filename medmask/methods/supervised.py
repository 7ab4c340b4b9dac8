"""Supervised training: cross-entropy on the labels as they are."""

from torch import Tensor, nn
from torch.nn import functional

from medmask.config.training import Training
from medmask.methods.base import Batch, Clock, Method, StepOutput
from medmask.models.backbones import Classifier


class Supervised(Method):
    """Minimise the mean cross-entropy of one classifier."""

    def __init__(self, network: Classifier, cfg: Training) -> None:
        super().__init__()
        self.network = network

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"network": [p for p in self.network.parameters() if p.requires_grad]}

    def training_step(self, batch: Batch, clock: Clock) -> StepOutput:
        return StepOutput(functional.cross_entropy(self.network(batch.images), batch.labels))

    def validation_step(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.network(batch.images)
        return {
            "loss": functional.cross_entropy(logits, batch.labels, reduction="none"),
            "predicted": logits.argmax(1),
        }

    def predict(self, images: Tensor) -> Tensor:
        return self.network(images).softmax(1)

    def export(self) -> dict[str, Tensor]:
        return self.network.state_dict()
