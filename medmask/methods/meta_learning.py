"""Learning from a step's effect on trusted images: weights of examples, trust in their labels, or both.

Agreement a of an example: minus the meta-gradient, above 0 where training on it lowers the trusted loss. From it come
a weight, max(a, 0) or sigmoid(a), and a trust sigmoid(a) by which the given label is blended with the prediction.

Source: Ren et al., ICML 2018, arXiv 1803.09050 (weights); github.com/Cute77/learning-to-reweight-examples (the rest).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn import functional

from medmask.errors import ConfigError
from medmask.methods.base import Batch, Clock, Method, Ranks, StepOutput
from medmask.methods.meta_gradient import (
    agreement_of,
    clean_direction,
    forward_with_last_layer_tangents,
    forward_with_tangents,
)
from medmask.models.backbones import Classifier


class MetaLearning(Method):
    """`reweight`, `refurbish`, `proposal` and `upper_bound`: which parts a method has, its settings say."""

    needs_meta_set = True
    memory_targets: Tensor
    before: Tensor
    teacher: tuple[nn.Module]

    def __init__(self, network: Classifier, cfg: Any) -> None:
        super().__init__(network, cfg)
        self.weighs = hasattr(cfg, "weights")
        self.has_teacher = hasattr(cfg, "teacher")
        self.refurbishes = hasattr(cfg, "targets") and not self.has_teacher
        self.is_soft = getattr(cfg, "targets", "hard") == "soft"
        self.skips = getattr(cfg, "weights", None) == "clamp" and cfg.epsilon == 0
        self.needs_truth = self.has_teacher  # type: ignore[misc]
        self.register_buffer("empty_steps", torch.zeros(()))
        self.empty_steps: Tensor

    def setup(self, data: Any, ctx: Ranks, optimizers: Mapping[str, optim.Optimizer]) -> None:
        super().setup(data, ctx, optimizers)
        self.is_shared = ctx.world > 1 and self.cfg.meta.scope == "global"
        self.is_alone = ctx.world > 1 and not self.is_shared
        n, unknown = len(data.train.labels), float("nan")
        if self.has_teacher:
            if data.teacher is None:
                raise ConfigError("teacher: needed by `method: upper_bound`, none was given")
            # in a tuple it is no part of the state, and never put into train mode
            self.teacher = (data.teacher.to(ctx.device).eval(),)
        if self.weighs:
            self.keep("weight", torch.full((n,), unknown))
        if self.refurbishes:
            self.keep("trust", torch.full((n,), unknown))
        if hasattr(self.cfg, "targets"):
            self.keep("label", torch.full((n,), unknown))
        if self.refurbishes and self.is_soft:
            self.keep("targets", functional.one_hot(torch.from_numpy(data.train.labels), data.n_classes))
        if getattr(self.cfg, "alternate", False):  # weight and trust by place in the global batch
            self.register_buffer("before", torch.ones(2, self.cfg.batch_size, device=ctx.device))

    def training_step(self, batch: Batch, clock: Clock) -> StepOutput:
        assert batch.meta is not None
        (optimizer,) = self.optimizers.values()
        trusted = (batch.meta.images, batch.meta.labels)
        if self.cfg.gradient == "last_layer":
            logits, tangents = forward_with_last_layer_tangents(self.network, optimizer, batch.images, *trusted)
        else:
            direction = clean_direction(self.network, optimizer, *trusted)
            logits, tangents = forward_with_tangents(self.network, batch.images, direction)
        targets = self.teach(batch, functional.one_hot(batch.labels, logits.shape[1]).to(logits.dtype))
        agreement = agreement_of(lambda scores: self.losses(scores, targets), logits, tangents)
        weight, trust, empty = self.judge(agreement, optimizer.param_groups[0]["lr"], clock)
        if self.refurbishes:
            targets = self.blend(batch, targets, logits.detach(), trust)
        known = {"weight": weight, "trust": trust, "label": targets.argmax(1), "targets": targets}
        known = {name: value for name, value in known.items() if hasattr(self, f"memory_{name}")}
        self.remember(batch, predicted=logits.argmax(1), **known)
        loss = (weight * self.losses(logits, targets)).mean()
        if getattr(self.cfg, "reduction", "mean") == "sum":
            loss = loss * self.size
        self.empty_steps += empty.any()
        logs = {"meta/empty_steps": empty.any().float(), "meta/agreement": agreement.mean()}
        return StepOutput(loss, logs, skip=empty.all() if self.skips else None)

    def teach(self, batch: Batch, given: Tensor) -> Tensor:
        """The targets (N, K) before any blending: given labels, those of flipped images by the teacher."""
        if not self.has_teacher:
            return given
        assert batch.true_labels is not None
        with torch.no_grad():
            probs = self.teacher[0](batch.images).softmax(1).to(given.dtype)
        taught = probs if self.is_soft else functional.one_hot(probs.argmax(1), probs.shape[1]).to(given.dtype)
        return torch.where((batch.labels != batch.true_labels)[:, None], taught, given)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each example, (N,)."""
        if self.is_soft and self.cfg.epsilon:
            return -(targets * (logits.softmax(1) + self.cfg.epsilon).log()).sum(1)
        return -(targets * logits.log_softmax(1)).sum(1)

    def judge(self, agreement: Tensor, lr: float, clock: Clock) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (N,) of mean 1 over the batch, trusts (N,), and whether all weights of a batch are 0, (1,).

        The batch is that of all ranks, unless `meta.scope` is rank: then the last is (ranks,).
        """
        n = len(agreement)
        everyone, before = agreement, 0
        if self.is_shared:
            marked = torch.stack([agreement, torch.ones_like(agreement)], dim=1)
            whole = self.ctx.gather_rows(marked, self.most)
            is_there = ~whole[..., 1].isnan()  # an agreement may be NaN itself, in a training that diverges
            everyone, before = whole[..., 0][is_there], int(is_there[: self.ctx.rank].sum())
        self.size = len(everyone)
        scaled = rescaled(everyone, self.cfg.rescale, lr)
        trust = scaled.sigmoid() if self.refurbishes else torch.ones_like(everyone)
        weight = torch.ones_like(everyone)
        if self.weighs:
            raw = everyone.clamp(min=0) if self.cfg.weights == "clamp" else scaled.sigmoid()
            weight = normalised(raw, self.cfg.epsilon)
        if getattr(self.cfg, "alternate", False):
            weight, trust = self.take_turns(weight, trust, clock)
        empty = (weight == 0).all().view(1)
        if self.is_alone and self.weighs:
            empty = self.ctx.gather_rows(empty.float(), 1)[:, 0] > 0
        return weight[before : before + n], trust[before : before + n], empty

    def take_turns(self, weight: Tensor, trust: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        """At even steps of an epoch new weights and the trusts of the step before, at odd ones the other way round."""
        stale = 1 if clock.step_in_epoch % 2 == 0 else 0
        new = torch.stack([weight, trust])
        start = len(weight) * self.ctx.rank if self.is_alone else 0  # alone, all ranks have as many
        new[stale] = self.before[stale, start : start + len(weight)]
        self.taken = new
        return new[0], new[1]

    def blend(self, batch: Batch, given: Tensor, logits: Tensor, trust: Tensor) -> Tensor:
        """Targets (N, K) between the labels given and the network's own prediction."""
        if self.is_soft:
            table = self.memory_targets[self.rows(batch)].to(given.dtype)
            return blend_soft(table, logits.softmax(1).to(given.dtype), trust)
        return blend_hard(given, logits.argmax(1), trust, self.cfg.blend)

    def after_step(self, clock: Clock, ctx: Ranks) -> None:
        super().after_step(clock, ctx)
        if getattr(self.cfg, "alternate", False):
            everyone = self.taken
            if self.is_alone:
                everyone = ctx.gather_rows(everyone.T.contiguous(), everyone.shape[1]).flatten(0, 1).T
            self.before.copy_(everyone)

    def notes(self) -> list[str]:
        n, whose = int(self.empty_steps), " of a rank" if self.is_alone else ""
        done = "they were skipped" if self.skips and not self.is_alone else "its images taught nothing"
        return [f"all weights{whose} were 0 in {n} step{'s' * (n != 1)}: {done}"] if n else []


def rescaled(agreement: Tensor, how: str, lr: float) -> Tensor:
    """What goes into the sigmoid, (N,): the agreement, over the learning rate, or standardised."""
    if how == "none":
        return agreement
    if how == "lr":
        return agreement / lr if lr else agreement
    spread = agreement.std(correction=0)
    return (agreement - agreement.mean()) / torch.where(spread > 0, spread, 1)


def normalised(weight: Tensor, epsilon: float) -> Tensor:
    """Weights (N,) over their mean, all 0 where they are. With epsilon: over sum + epsilon."""
    total = weight.sum() + epsilon
    return weight / torch.where(total > 0, total, 1) * len(weight)


def blend_hard(given: Tensor, predicted: Tensor, trust: Tensor, how: str) -> Tensor:
    """Targets (N, K) from one-hot labels (N, K), predicted classes (N,) and trusts (N,).

    loss: trust and its rest as probabilities, so that the loss is the two labels' losses blended; choose: the given
    label from a trust of 0.5 on; index: class trunc(trust y + (1 - trust) y^), as published, which may be neither.
    """
    other = functional.one_hot(predicted, given.shape[1]).to(given.dtype)
    trust = trust.to(given.dtype)[:, None]
    if how == "loss":
        return trust * given + (1 - trust) * other
    if how == "choose":
        return torch.where(trust >= 0.5, given, other)
    number = trust[:, 0] * given.argmax(1) + (1 - trust[:, 0]) * predicted
    return functional.one_hot(number.trunc().long(), given.shape[1]).to(given.dtype)


def blend_soft(table: Tensor, probs: Tensor, trust: Tensor) -> Tensor:
    """Targets (N, K), rows sum to 1: an image's soft label blended with its prediction (N, K) by its trust (N,)."""
    trust = trust.to(table.dtype)[:, None]
    return trust * table + (1 - trust) * probs
