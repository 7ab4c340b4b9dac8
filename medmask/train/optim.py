"""Optimizers, and the learning rate as a pure function of the epoch."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn, optim

from medmask.config.training import Training


def build_optimizers(cfg: Training, groups: Mapping[str, list[nn.Parameter]]) -> dict[str, optim.Optimizer]:
    """One optimizer a group of parameters, by the group's name."""
    return {name: build_optimizer(cfg, parameters) for name, parameters in groups.items() if parameters}


def build_optimizer(cfg: Training, parameters: list[nn.Parameter]) -> optim.Optimizer:
    if cfg.optimizer == "sgd":
        return optim.SGD(
            parameters, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, weight_decay=cfg.weight_decay
        )
    kind = optim.Adam if cfg.optimizer == "adam" else optim.AdamW
    return kind(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay)


def momenta_of(network: nn.Module, optimizers: Mapping[str, optim.Optimizer]) -> dict[str, Tensor]:
    """What the optimizers remember of each parameter of a network: `<parameter>.<entry>` to its tensor."""
    states = {parameter: entries for one in optimizers.values() for parameter, entries in one.state.items()}
    return {
        f"{name}.{entry}": value
        for name, parameter in network.named_parameters()
        for entry, value in states.get(parameter, {}).items()
        if value is not None
    }


def set_momenta(network: nn.Module, optimizers: Mapping[str, optim.Optimizer], momenta: Mapping[str, Tensor]) -> None:
    """Let the optimizers go on with `momenta_of` another training of the same network; what fits no parameter is left.

    A parameter that has none, because it was frozen or its layer is new, starts without momentum.
    """
    names = {parameter: name for name, parameter in network.named_parameters()}
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                start = f"{names.get(parameter)}."
                own = {name.removeprefix(start): value for name, value in momenta.items() if name.startswith(start)}
                if own:
                    optimizer.state[parameter] = {
                        entry: value.clone() if value.dim() == 0 else torch.empty_like(parameter.detach()).copy_(value)
                        for entry, value in own.items()
                    }


def lr_at(cfg: Training, epoch: int) -> float:
    """Learning rate of an epoch, counted from 0: linear warm-up, then the schedule, which starts where that ends."""
    warmup, schedule = cfg.warmup, cfg.schedule
    if epoch < warmup.epochs:
        return cfg.lr * (warmup.factor + (1 - warmup.factor) * epoch / warmup.epochs)
    age = epoch - warmup.epochs
    if schedule.kind == "step":
        return cfg.lr * schedule.gamma ** (age // schedule.every)
    if schedule.kind == "exponential":
        return cfg.lr * schedule.gamma**age
    if schedule.kind == "cosine":
        wave = (1 + math.cos(math.pi * age / (cfg.epochs - warmup.epochs))) / 2
        return cfg.lr * (schedule.floor + (1 - schedule.floor) * wave)
    return cfg.lr
