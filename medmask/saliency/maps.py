"""Saliency maps: how much each place of an activation speaks for a class. Batched, with one short backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

Weigh = Callable[[Tensor, Tensor, float], Tensor]


def xgradcam(activation: Tensor, gradient: Tensor, epsilon: float) -> Tensor:
    """Weight of each channel, (N, C): sum of gradient x activation over the sum of the activation.

    Source: Fu et al., BMVC 2020, arXiv 2008.02312. epsilon: 1e-8 in torchcam, 1e-7 in pytorch-grad-cam.
    """
    return (gradient * activation).sum((2, 3)) / (activation.sum((2, 3)) + epsilon)


def gradcam(activation: Tensor, gradient: Tensor, epsilon: float) -> Tensor:
    """Weight of each channel, (N, C): mean gradient. Source: Selvaraju et al., ICCV 2017; epsilon is not used."""
    return gradient.mean((2, 3))


METHODS: dict[str, Weigh] = {"xgradcam": xgradcam, "gradcam": gradcam}


class Explainer:
    """Explains the scores of a classifier by one of its activations; nothing of it stays in the network.

    Parameters
    ----------
    network : (N, C, H, W) images to (N, K) logits; put in eval mode. method : a key of METHODS.
    """

    def __init__(self, network: nn.Module, layer: nn.Module, method: str, epsilon: float = 1e-8) -> None:
        self.network, self.layer = network.eval(), layer
        self.weigh, self.epsilon = METHODS[method], epsilon
        self.activation = torch.empty(0)

    def __call__(self, images: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps (N, h, w) float32, smallest value 0 and largest 1, or all 0, and logits (N, K).

        targets : (N,) int64, the classes explained; None explains the predicted ones.
        """
        with torch.no_grad(), self.watch():
            logits = self.network(images)
        chosen = logits.detach().argmax(1) if targets is None else targets
        # an image's scores depend on no other image in eval mode, so the sum has all their gradients
        (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), self.activation)
        activation, gradient = self.activation.detach().float(), gradient.float()
        self.activation = torch.empty(0)
        weights = self.weigh(activation, gradient, self.epsilon)
        return scaled(torch.einsum("nc,nchw->nhw", weights, activation).relu()), logits.detach()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the layer's last output, and only from there on what a backward pass needs."""

        def keep(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            torch.set_grad_enabled(True)  # until the `no_grad` around the forward pass ends
            self.activation = output.detach().requires_grad_()
            return self.activation.clone()  # a later layer may work in place

        hook = self.layer.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()


def scaled(maps: Tensor) -> Tensor:
    """Shift and scale each map to 0..1, (N, h, w); one that is the same everywhere becomes all 0."""
    flat = maps.flatten(1)
    low = flat.amin(1)[:, None, None]
    high = flat.amax(1)[:, None, None] - low
    return torch.where(high > 0, (maps - low) / high.where(high > 0, 1.0), 0.0)


def resized(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps (N, h, w) at the size of the image, (N, H, W): bilinear, then scaled anew."""
    return scaled(functional.interpolate(maps[:, None], (height, width), mode="bilinear")[:, 0])
