"""Backbones: from images to pooled features, a network without its last layer."""

import difflib

import torch
from torch import Tensor, nn

from medmask.errors import ConfigError, suggest

HEAD_NAMES = ("fc", "classifier", "heads", "head")  # where torchvision's networks keep their last layer
SMALL_CNN_SIDE = 28


class SmallCNN(nn.Sequential):
    """Four 3x3 convolutions without padding for 28x28 images: 16,848 parameters with 3 channels, 512 features.

    Source: MaskTune, arXiv 2210.00055, the network for its biased MNIST.
    """

    width = 512  # 32 channels, 4 x 4

    def __init__(self, channels: int) -> None:
        super().__init__(
            *convolution(channels, 16), *convolution(16, 16), nn.MaxPool2d(2),
            *convolution(16, 32), *convolution(32, 32), nn.MaxPool2d(2), nn.Flatten(),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if (height, width) != (SMALL_CNN_SIDE, SMALL_CNN_SIDE):
            raise ConfigError(f"image.size: small_cnn needs {SMALL_CNN_SIDE}, got images of {height} x {width} pixels")
        return super().forward(images)


class Classifier(nn.Module):
    """A backbone and a head: (N, C, H, W) images to (N, K) logits, which are float32 under autocast too."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(self.backbone(images))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # softmax and losses would stay in bf16


def build_backbone(name: str, channels: int) -> nn.Module:
    """Build a network with fresh weights whose attribute `width` is the number F of its features (N, F).

    Parameters
    ----------
    name : `small_cnn`, a classification network of torchvision, `resnet10t`, or `timm.` and a network of timm
    channels : of the images, 1 or 3

    Raises
    ------
    ConfigError : no such network, or one whose last layer cannot be taken off.
    """
    if name == "small_cnn":
        return SmallCNN(channels)
    if name == "resnet10t" or name.startswith("timm."):
        return timm_backbone(name.removeprefix("timm."), channels)
    return torchvision_backbone(name, channels)


def width_of(backbone: nn.Module) -> int:
    """Number of features F of a backbone."""
    return int(backbone.width)  # type: ignore[arg-type]


def convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU()


def timm_backbone(name: str, channels: int) -> nn.Module:
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ConfigError(f"backbone: timm has no network {name!r}; close: {', '.join(close) or 'none'}")
    network = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
    network.width = getattr(network, "head_hidden_size", None) or network.num_features
    return network


def torchvision_backbone(name: str, channels: int) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        known = ["small_cnn", "resnet10t", "timm.<name>", *names]
        raise ConfigError(f"backbone: unknown name {name!r}; {suggest(name, known)}")
    has_side_output = name in ("googlenet", "inception_v3")
    network = models.get_model(name, weights=None, **({"aux_logits": False} if has_side_output else {}))
    place = next((place for place in HEAD_NAMES if hasattr(network, place)), None)
    width = None if place is None else replace_last(network, place)
    if width is None:
        raise ConfigError(f"backbone: {name} does not end in a linear layer that a new head could replace")
    network.width = width
    if channels != 3:
        replace_first(network, channels)
    return network


def replace_last(network: nn.Module, place: str) -> int | None:
    """Replace the last linear layer at or under `network.<place>` by nothing; return its number of inputs."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    name = names[-1] if names else ""
    if name != place and not name.startswith(place + "."):
        return None
    width = network.get_submodule(name).in_features
    network.set_submodule(name, nn.Identity())
    return int(width)  # type: ignore[arg-type]


def replace_first(network: nn.Module, channels: int) -> None:
    """Give the first convolution another number of input channels, with fresh weights."""
    name, old = next((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)  # type: ignore[arg-type]
    network.set_submodule(name, new)
