"""Keep parts of a backbone as they are while the rest is trained."""

from torch import nn

from medmask.errors import ConfigError


def freeze_stages(backbone: nn.Module, depth: str | int) -> None:
    """Switch off the gradients of a backbone's first stages, and mark them for `keep_frozen`.

    Parameters
    ----------
    depth : `none` trains all, `all` trains nothing, n trains the last n stages. A stage is a child that has
        parameters; a network that keeps all its parameters in one child is looked at from inside that child.
    """
    if depth == "none":
        return
    stages = stages_of(backbone)
    kept = 0 if depth == "all" else int(depth)
    if not 0 <= kept <= len(stages):
        raise ConfigError(f"freeze: need none, all, or 0 to {len(stages)} stages of this backbone, got {depth}")
    backbone.requires_grad_(False)
    for stage in stages[len(stages) - kept :]:
        stage.requires_grad_(True)
    for stage in [backbone] if kept == 0 else stages[: len(stages) - kept]:
        stage.is_frozen = True  # type: ignore[assignment]


def stages_of(backbone: nn.Module) -> list[nn.Module]:
    """The children that have parameters, in order."""
    stages = [child for child in backbone.children() if any(True for _ in child.parameters())]
    return stages_of(stages[0]) if len(stages) == 1 and any(True for _ in stages[0].children()) else stages


def keep_frozen(network: nn.Module) -> None:
    """Put frozen parts into eval mode, so that their batch norm keeps its statistics; call it after `train()`."""
    for module in network.modules():
        if getattr(module, "is_frozen", False):
            module.eval()
