"""The training loop, the only one: every method runs in it."""

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medmask import io
from medmask.config.training import Training
from medmask.errors import ConfigError, Stopped
from medmask.methods.base import Batch, Clock, Method
from medmask.models.freeze import keep_frozen
from medmask.train import per_image
from medmask.train.batchnorm import convert_batchnorm, share_statistics
from medmask.train.checkpoint import Checkpointer
from medmask.train.distributed import DistContext, Verdict
from medmask.train.history import History, Progress, is_logged
from medmask.train.loader import Parts, Plan, TrainingData, training_parts
from medmask.train.optim import build_optimizers, lr_at, set_momenta
from medmask.train.signals import StopFlag
from medmask.train.validation import is_better, validate


@dataclass
class State:
    """What a checkpoint holds beside weights and optimizers."""

    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    first_commit: str = field(default_factory=io.commit)
    best_epoch: int = -1
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the losses since the last line of the history
    steps_summed: int = 0


@dataclass(frozen=True)
class Execution:
    """How and where a training runs: nothing here changes its result."""

    ctx: DistContext
    checkpointer: Checkpointer
    work_dir: Path
    checkpoint_min: float = 15
    stop: StopFlag = field(default_factory=StopFlag)


def fit(
    cfg: Training, method: Method, data: TrainingData, execution: Execution, momenta: Mapping[str, Tensor] | None = None
) -> State:
    """Train a method to its last epoch, from its newest checkpoint if there is one.

    At its first step the optimizers have the `momenta`, if any, by `<parameter>.<entry>` of `method.network`.
    Afterwards `method` holds the weights of the last epoch, and the state that is returned those of the best one.

    Raises
    ------
    Stopped : told to stop by a signal; the state is saved.
    ConfigError : the loss is not finite, or the batches cannot be shared by the ranks.
    """
    run = Run(cfg, method, data, execution, momenta or {})
    state, plan, stop = run.state, run.plan, execution.stop
    parts = training_parts(run.parts, state.step, cfg.workers, pin=run.ctx.device.type == "cuda")
    try:
        for epoch in range(state.step // plan.steps, cfg.epochs):
            run.start_epoch(epoch)
            for step_in_epoch in range(state.step % plan.steps, plan.steps):
                clock = run.clock(epoch, step_in_epoch)
                verdict = run.train_step(clock, parts, stop.is_set)
                if step_in_epoch + 1 < plan.steps:  # after the last step of an epoch comes its validation
                    run.follow(verdict)
            run.end_epoch(clock)
    finally:
        run.close()
    return state


class Run:
    """One training: its networks, optimizers, clocks and files."""

    def __init__(
        self, cfg: Training, method: Method, data: TrainingData, execution: Execution, momenta: Mapping[str, Tensor]
    ) -> None:
        self.cfg, self.data, self.execution = cfg, data, execution
        self.ctx = ctx = execution.ctx
        self.plan = Plan(cfg, len(data.train), ctx.world)
        self.parts = Parts(self.plan, data, ctx.rank, method)
        # convolutions are a fifth faster with the channels last, on a CPU too
        self.method = method.to(ctx.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if ctx.world > 1 and cfg.sync_bn:
            convert_batchnorm(self.method, ctx.device, forward_mode=method.needs_meta_set)
        groups = self.method.param_groups()
        self.trained = [parameter for group in groups.values() for parameter in group]
        if not self.trained:
            raise ConfigError("freeze: nothing is left to train")
        self.optimizers = build_optimizers(cfg, groups)
        set_momenta(method.network, self.optimizers, momenta)
        self.method.setup(data, ctx, self.optimizers)
        self.state = self.restore()
        self.model: nn.Module = self.method
        if ctx.world > 1:
            self.model = wrap(self.method)
        self.history = History(execution.work_dir, self.state.step) if ctx.is_main else None
        if ctx.is_main and self.state.step == 0:
            shutil.rmtree(execution.work_dir / per_image.FOLDER, ignore_errors=True)
        self.progress = Progress(cfg.epochs, self.plan.steps * cfg.epochs, self.state.step, ctx.is_main)
        self.save_every = execution.checkpoint_min * 60
        self.saved_at = self.counted_at = self.logged_at = time.monotonic()
        self.images_logged = 0

    def clock(self, epoch: int, step_in_epoch: int) -> Clock:
        total = self.plan.steps * self.cfg.epochs
        return Clock(self.state.step, step_in_epoch, epoch, self.state.step / max(1, total - 1))

    def start_epoch(self, epoch: int) -> None:
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr_at(self.cfg, epoch)
        if self.state.step % self.plan.steps == 0:
            self.method.before_epoch(self.data, self.ctx)
        self.logged_at, self.images_logged = time.monotonic(), 0

    def train_step(self, clock: Clock, parts: Iterator[Batch], stop: bool) -> Verdict:
        """One optimizer step on one global batch; returns the ranks' verdict on the step before."""
        seed_step(self.cfg.seed, clock.step, self.ctx.rank)
        uses_statistics = self.cfg.train_mode == "always" or clock.step_in_epoch == 0
        self.method.train(uses_statistics)
        keep_frozen(self.method)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss, skip = self.backward(clock, parts)
        due = self.ctx.is_main and time.monotonic() - self.saved_at > self.save_every
        verdict = self.ctx.agree(loss, stop, due)
        self.check_finite(verdict, clock.step - 1)
        if self.cfg.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self.cfg.clip_norm)
        if not skip:
            for optimizer in self.optimizers.values():
                optimizer.step()
        if uses_statistics and self.ctx.world > 1 and not self.cfg.sync_bn:
            share_statistics(self.method)
        self.method.after_step(clock, self.ctx)
        self.state.step += 1
        if is_logged(clock.step_in_epoch, self.plan.steps):
            self.write_log(clock)
        return verdict

    def backward(self, clock: Clock, parts: Iterator[Batch]) -> tuple[Tensor, bool]:
        """Gradients of the mean loss over the global batch, part by part; this rank's share of the loss, and `skip`.

        DistributedDataParallel takes the mean over ranks, so a rank's mean over its own images is scaled by its
        number of images, times the number of ranks, over those of all.
        """
        size = len(self.plan.span(clock.step_in_epoch))
        n_parts = len(self.plan.parts(size))
        total, skip = torch.zeros((), device=self.ctx.device), True
        for part in range(n_parts):
            batch = next(parts).to(self.ctx.device)
            scale = len(batch.images) * self.ctx.world / size
            waits = self.ctx.world > 1 and part + 1 < n_parts
            with self.model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(self.ctx.device.type, torch.bfloat16, enabled=self.cfg.precision == "bf16"):
                    out = self.model(batch, clock)
                loss = out.loss * scale
                loss.backward()
            total = total + loss.detach().float()
            skip = skip and bool(out.skip)
            self.add(out.logs, scale)
        self.add({"loss/total": total}, 1.0)
        self.state.steps_summed += 1
        self.state.images_seen += size
        self.images_logged += size
        return total, skip

    def add(self, values: Mapping[str, Tensor], scale: float) -> None:
        sums = self.state.sums
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double() * scale

    def write_log(self, clock: Clock) -> None:
        """Mean losses over the steps since the last line; all ranks take part, the main one writes."""
        state = self.state
        means = {name: rounded(self.ctx.mean(total) / state.steps_summed) for name, total in sorted(state.sums.items())}
        speed = round(self.images_logged / max(1e-9, time.monotonic() - self.logged_at), 1)
        state.sums, state.steps_summed = {}, 0
        self.logged_at, self.images_logged = time.monotonic(), 0
        if self.history is not None:
            lr = lr_at(self.cfg, clock.epoch)
            self.history.write(step=state.step, epoch=clock.epoch + 1, **means, lr=lr, images_per_s=speed)
            self.progress.step(clock.epoch + 1, state.step, means["loss/total"], speed)

    def check_finite(self, verdict: Verdict, step: int) -> None:
        if verdict.not_finite:
            lr = lr_at(self.cfg, step // self.plan.steps)
            raise ConfigError(
                f"lr: the loss at step {step} is not finite, at a learning rate of {lr:.6g}; "
                "lower `lr`, set `clip_norm`, or lengthen `warmup`"
            )

    def follow(self, verdict: Verdict) -> None:
        """Save, and stop, where the ranks have agreed to."""
        if not (verdict.stop or verdict.save):
            return
        latest = self.ctx.answer()
        self.check_finite(latest, self.state.step - 1)
        self.save()
        self.stop_if(verdict.stop or latest.stop)

    def stop_if(self, told: bool) -> None:
        total = self.plan.steps * self.cfg.epochs
        if told and self.state.step < total:
            raise Stopped(
                f"stopped after step {self.state.step} of {total} and saved in {self.execution.checkpointer.folder}; "
                "the same command goes on from there"
            )

    def end_epoch(self, clock: Clock) -> None:
        """Validate, keep the best weights, save."""
        state = self.state
        verdict = self.ctx.answer()
        self.check_finite(verdict, state.step - 1)
        self.method.after_epoch(clock, self.ctx)
        state.last = validate(self.method, self.data, self.ctx)
        if is_better(state.last, state.best, self.cfg.select):
            state.best, state.best_epoch = state.last, clock.epoch
            state.best_weights = {name: value.detach().cpu().clone() for name, value in self.method.export().items()}
        if self.history is not None:
            self.progress.epoch(clock.epoch + 1, state.step, state.last)
            self.write_epoch(self.history, clock.epoch + 1)
        self.save()
        self.stop_if(verdict.stop)

    def write_epoch(self, history: History, epoch: int) -> None:
        """The numbers of an epoch, counted from 1, and at times those of each image."""
        memory, side, step = self.method.memory(), self.data.train, self.state.step
        numbers = {f"val/{name}": value for name, value in self.state.last.items()} | per_image.numbers_of(memory, side)
        if numbers:
            history.write(step=step, epoch=epoch, **numbers)
        if per_image.is_recorded(epoch, self.cfg.record_every, self.cfg.epochs):
            per_image.write_table(self.execution.work_dir, epoch, memory, side)
            for name, values in per_image.histograms_of(memory, side).items():
                history.histogram(name, values, step)

    def save(self) -> None:
        now = time.monotonic()
        self.state.seconds += now - self.counted_at
        self.saved_at = self.counted_at = now
        self.state.sums = {name: self.ctx.mean(total) for name, total in sorted(self.state.sums.items())}
        if self.ctx.is_main:
            optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
            content = {"method": self.method.state_dict(), "optimizers": optimizers, "state": vars(self.state)}
            self.execution.checkpointer.save(self.state.step, content)

    def restore(self) -> State:
        content = self.execution.checkpointer.load()
        if content is None:
            return State()
        self.method.load_state_dict(content["method"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(content["optimizers"][name])
        state = State(**content["state"])
        state.sums = {name: value.to(self.ctx.device) for name, value in state.sums.items()}
        return state

    def close(self) -> None:
        self.progress.close()
        if self.history is not None:
            self.history.close()


def rounded(value: Tensor) -> float:
    """To float32: a sum that was cut in two by a stop differs in the last bits of float64."""
    return float(value.float())


def wrap(method: Method) -> nn.parallel.DistributedDataParallel:
    """Average gradients over the ranks, always in the same order of summation.

    Without `find_unused_parameters` torch lays its buckets anew after the first step of a process. From three ranks on
    the place in a bucket decides in which order the ranks are summed, so a resumed run would differ in the last bit.
    That all parameters are used is warned of once, by torch's C++ part: the launcher keeps it quiet.
    """
    return nn.parallel.DistributedDataParallel(method, broadcast_buffers=False, find_unused_parameters=True)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step, so that nothing random has to be kept in a checkpoint."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
