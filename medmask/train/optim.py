"""Optimizers, and the learning rate as a pure function of the epoch."""

import math
from collections.abc import Mapping

from torch import nn, optim

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
