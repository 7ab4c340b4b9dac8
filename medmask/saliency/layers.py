"""Find the activation of a network that saliency maps explain."""

import torch
from torch import Tensor, nn

from medmask.errors import ConfigError, suggest

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish)


def find_layer(network: nn.Module, name: str, image: Tensor) -> tuple[str, nn.Module]:
    """The layer called `name` and its module; `last_relu` is the last spatial activation before pooling.

    Parameters
    ----------
    network : in eval mode. image : (1, C, H, W) float32, what the network is used on.

    Raises
    ------
    ConfigError : no layer of this name puts out maps (N, C, h, w) of more than one cell; lists those that do.
    """
    spatial = spatial_layers(network, image)
    if not spatial:
        raise ConfigError("mask.layer: this network has no layer whose output is a map, so nothing can be explained")
    if name == "last_relu":
        found = [layer for layer in spatial if isinstance(network.get_submodule(layer), ACTIVATIONS)]
        if not found:
            raise ConfigError(
                "mask.layer: this network has no activation whose output is a map; name a layer, "
                f"{suggest(name, spatial)}"
            )
        name = found[-1]
    elif name not in spatial:
        raise ConfigError(f"mask.layer: no layer {name!r} whose output is a map; {suggest(name, spatial)}")
    return name, network.get_submodule(name)


def spatial_layers(network: nn.Module, image: Tensor) -> list[str]:
    """Names of the layers with an output (N, C, h, w), h * w > 1, in the order of their last call."""
    called: dict[str, None] = {}

    def note(name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
                called.pop(name, None)
                called[name] = None

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in network.named_modules() if name]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return list(called)
