"""Heads: from pooled features (N, F) to class scores (N, K). Keyword arguments have the names of the config."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from medmask.config.training import Head
from medmask.errors import lookup


def linear(width: int, n_classes: int) -> nn.Module:
    return nn.Linear(width, n_classes)


def mlp_bn(width: int, n_classes: int, *, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, n_classes))


def nonlinear(width: int, n_classes: int, *, ratio: float, dropout: float) -> nn.Module:
    """One hidden layer of `ratio * width` units, with batch norm and dropout."""
    hidden = max(1, int(width * ratio))
    first, last = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, n_classes)
    initialise(first, last)
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.LeakyReLU(), nn.Dropout(dropout), last)


class ConvHead(nn.Module):
    """A convolution along the features, taken as a signal, then `nonlinear`; with `skip` plus a linear road past it.

    Source: Frees et al., arXiv 2508.17567 and their repository danielfrees/RadImageNet.
    """

    def __init__(
        self, width: int, n_classes: int, *, ratio: float, filters: int, kernel: int, dropout: float, skip: bool
    ) -> None:
        super().__init__()
        convolution = nn.Conv1d(1, filters, kernel, bias=False)
        initialise(convolution)
        inner = filters * (width - kernel + 1)
        norm = nn.BatchNorm1d(filters)
        self.convolution = nn.Sequential(convolution, norm, nn.LeakyReLU(), nn.Dropout(dropout), nn.Flatten())
        road = [nn.Linear(width, inner, bias=False), nn.BatchNorm1d(inner), nn.ReLU()]
        self.skip = nn.Sequential(*road) if skip else None
        self.classify = nonlinear(inner, n_classes, ratio=ratio, dropout=dropout)

    def forward(self, features: Tensor) -> Tensor:
        signal = self.convolution(
            features.unsqueeze(1)
        )  # (N, F) -> (N, 1, F) -> (N, I), I = filters * (F - kernel + 1)
        return self.classify(signal if self.skip is None else signal + self.skip(features))


def conv(width: int, n_classes: int, *, ratio: float, filters: int, kernel: int, dropout: float) -> nn.Module:
    return ConvHead(width, n_classes, ratio=ratio, filters=filters, kernel=kernel, dropout=dropout, skip=False)


def convskip(width: int, n_classes: int, *, ratio: float, filters: int, kernel: int, dropout: float) -> nn.Module:
    return ConvHead(width, n_classes, ratio=ratio, filters=filters, kernel=kernel, dropout=dropout, skip=True)


HEADS: dict[str, Callable[..., nn.Module]] = {
    "linear": linear,
    "mlp_bn": mlp_bn,
    "nonlinear": nonlinear,
    "conv": conv,
    "convskip": convskip,
}


def initialise(*layers: nn.Conv1d | nn.Linear) -> None:
    """Kaiming normal weights for ReLU, zero biases."""
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def head_settings(head: Head) -> dict[str, Any]:
    """The settings that a head of this kind uses, as they are kept with a model."""
    build = lookup(HEADS, head.kind, "head.kind")
    names = [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {"kind": head.kind, **{name: getattr(head, name) for name in names}}


def build_head(settings: Mapping[str, Any], *, width: int, n_classes: int) -> nn.Module:
    """Build a head with fresh weights from what `head_settings` returned."""
    rest = {name: value for name, value in settings.items() if name != "kind"}
    return lookup(HEADS, str(settings.get("kind")), "head.kind")(width, n_classes, **rest)
