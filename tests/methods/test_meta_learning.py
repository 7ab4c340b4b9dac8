"""Weights, trusts and targets by hand, and the whole step against the definition."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from medmask.config.finetuning import Meta
from medmask.config.training import Augment
from medmask.errors import ConfigError, Stopped
from medmask.methods import build_method
from medmask.methods.base import Batch, Clock
from medmask.methods.meta_learning import blend_hard, normalised, rescaled
from medmask.models.backbones import Classifier
from medmask.train.checkpoint import Checkpointer
from medmask.train.distributed import DistContext
from medmask.train.fit import Execution, fit
from medmask.train.loader import MetaPlan, Parts, Plan, training_parts
from medmask.train.optim import build_optimizers
from tests.toy import StopAfter, is_same, run_fit, settings, tiny_network, toy_data


def make(data, network=None, **changes):
    cfg = settings(**{"momentum": 0, **changes})
    method = build_method(cfg.method, network or tiny_network(norm=False), cfg)
    method.setup(data, DistContext(), build_optimizers(cfg, method.param_groups()))
    return method.train()


def clock(step):
    return Clock(step, step, 0, 0.0)


def batch_of(data, rows, trusted=(0, 1)):
    rows, trusted = np.asarray(rows), np.asarray(trusted)
    meta = data.meta_set
    return Batch(
        data.reader.batch(data.train.positions[rows]),
        torch.from_numpy(data.train.labels[rows]),
        torch.from_numpy(data.train.positions[rows]),
        torch.from_numpy(data.train.true_labels[rows]),
        Batch(
            data.reader.batch(meta.positions[trusted]),
            torch.from_numpy(meta.labels[trusted]),
            torch.from_numpy(meta.positions[trusted]),
        ),
    )


def agreement_by_definition(network, batch, lr):
    """lr times the inner products of the clean gradient, at the same weights, with the gradient of each example."""
    network = copy.deepcopy(network)
    parameters = [p for p in network.parameters() if p.requires_grad]

    def gradient(images, labels):
        return torch.autograd.grad(functional.cross_entropy(network(images), labels), parameters)

    clean = gradient(batch.meta.images, batch.meta.labels)
    return torch.tensor(
        [
            lr * sum(float((a * b).sum()) for a, b in zip(clean, gradient(image[None], label[None]), strict=True))
            for image, label in zip(batch.images, batch.labels, strict=True)
        ]
    )


def test_agreement_of_the_last_layer_alone(tmp_path):
    data = toy_data(tmp_path, flip_every=3)
    batch = batch_of(data, range(7))
    method = make(data, method="reweight", gradient="last_layer")
    network = copy.deepcopy(method.network)
    for parameter in network.backbone.parameters():
        parameter.requires_grad_(False)
    expected = agreement_by_definition(network, batch, 0.05).mean()
    found, exact = (float(m(batch, clock(0)).logs["meta/agreement"]) for m in (method, make(data, method="reweight")))
    assert found == pytest.approx(float(expected), rel=1e-3)
    assert found != pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize(
    ("weights", "rescale"), [("clamp", "none"), ("sigmoid", "none"), ("sigmoid", "std"), ("sigmoid", "lr")]
)
def test_loss_of_reweighting_by_the_definition(tmp_path, weights, rescale):
    data = toy_data(tmp_path, flip_every=3)
    method = make(data, method="reweight", weights=weights, rescale=rescale)
    batch = batch_of(data, range(7))
    a = agreement_by_definition(method.network, batch, 0.05)
    z = {"none": a, "lr": a / 0.05, "std": (a - a.mean()) / a.std(correction=0)}[rescale]
    w = a.clamp(min=0) if weights == "clamp" else torch.sigmoid(z)
    each = functional.cross_entropy(method.network(batch.images), batch.labels, reduction="none")
    out = method(batch, clock(0))
    torch.testing.assert_close(out.loss, (w / w.sum() * each).sum(), rtol=1e-4, atol=1e-6)
    assert float(out.logs["meta/agreement"]) == pytest.approx(float(a.mean()), rel=1e-3)
    method.after_step(clock(0), DistContext())
    torch.testing.assert_close(method.memory()["weight"][:7], w / w.mean(), rtol=1e-3, atol=1e-4)
    assert method.memory()["weight"][7:].isnan().all()


@pytest.mark.parametrize(("reduction", "factor"), [("mean", 1), ("sum", 7)])
def test_loss_of_blended_labels_by_the_definition(tmp_path, reduction, factor):
    data = toy_data(tmp_path, flip_every=3)
    method = make(data, method="refurbish", targets="hard", reduction=reduction, rescale="lr")
    batch = batch_of(data, range(7))
    trust = torch.sigmoid(agreement_by_definition(method.network, batch, 0.05) / 0.05)
    logits = method.network(batch.images)
    given, own = (
        functional.cross_entropy(logits, labels, reduction="none") for labels in (batch.labels, logits.argmax(1))
    )
    loss = method(batch, clock(0)).loss
    torch.testing.assert_close(loss, factor * (trust * given + (1 - trust) * own).mean(), rtol=1e-4, atol=1e-6)
    method.after_step(clock(0), DistContext())
    torch.testing.assert_close(method.memory()["trust"][:7], trust, rtol=1e-3, atol=1e-4)


def test_the_table_of_soft_labels_is_kept_by_image_and_in_the_checkpoint(tmp_path):
    data = toy_data(tmp_path, flip_every=3)
    method = make(data, method="refurbish", rescale="none")
    expected = functional.one_hot(torch.from_numpy(data.train.labels), 2).float()
    for step, rows in enumerate(([3, 5, 7, 1], [0, 2, 5, 20])):
        batch = batch_of(data, rows)
        trust = torch.sigmoid(agreement_by_definition(method.network, batch, 0.05))[:, None]
        if step:  # the losses that tell the agreement are those of the labels given
            assert not torch.allclose(expected[5], functional.one_hot(batch.labels, 2)[2].float())
        expected[rows] = trust * expected[rows] + (1 - trust) * method.predict(batch.images).detach()
        loss = method(batch, clock(step)).loss
        log_probs = method.network(batch.images).log_softmax(1)
        torch.testing.assert_close(loss, -(expected[rows] * log_probs).sum(1).mean())
        method.after_step(clock(step), DistContext())
        torch.testing.assert_close(method.memory()["targets"], expected)
    assert "memory_targets" in method.state_dict()


def test_the_upper_bound_takes_its_teacher_for_flipped_images_only(tmp_path):
    data = toy_data(tmp_path, flip_every=3)
    data.teacher.head.weight.data.zero_()
    data.teacher.head.bias.data = torch.tensor([-1.0, 1.0])  # says 1 of everything
    for targets, share in (("hard", 1.0), ("soft", float(torch.tensor([-1.0, 1.0]).softmax(0)[1]))):
        method = make(data, method="upper_bound", targets=targets)
        batch = batch_of(data, range(6))
        given = functional.one_hot(batch.labels, 2).float()
        is_flipped = batch.labels != batch.true_labels
        assert is_flipped.tolist() == [True, False, False, True, False, False]
        taught = method.teach(batch, given)
        assert torch.equal(taught[~is_flipped], given[~is_flipped])
        assert taught[is_flipped][:, 1].tolist() == pytest.approx([share, share])
        method(batch, clock(0)).loss.backward()
        assert all(p.grad is None for p in data.teacher.parameters())
        method.train()
        assert not data.teacher.training
        assert not any("teacher" in name for name in method.state_dict())


def test_a_batch_without_a_weight_teaches_nothing_and_is_counted(tmp_path):
    data = toy_data(tmp_path)
    method = make(data, method="reweight")
    batch = batch_of(data, [0, 2, 4], trusted=[1])  # class 0 only, and a trusted image of class 1
    method.network.backbone = nn.Flatten()
    method.network.head = nn.Linear(64, 2, bias=False)
    nn.init.zeros_(method.network.head.weight)
    method.optimizers = build_optimizers(method.cfg, method.param_groups())
    meta = Batch(batch.meta.images + 2, batch.meta.labels, batch.meta.positions)
    shifted = Batch(batch.images + 2, batch.labels, batch.positions, meta=meta)  # no pixel is below 0
    out = method(shifted, clock(0))
    out.loss.backward()
    assert (float(out.loss.detach()), float(out.logs["meta/empty_steps"])) == (0.0, 1.0)
    assert float(method.network.head.weight.grad.abs().max()) == 0
    method.after_step(clock(0), DistContext())
    assert method.memory()["weight"][[0, 2, 4]].tolist() == [0, 0, 0]
    assert method.notes() == ["all weights were 0 in 1 step: they were skipped"]
    assert bool(out.skip)
    for other_is_empty in (False, True):  # with another rank that weighs its own images
        ctx = Beside(other_is_empty)
        method.cfg = method.cfg.model_copy(update={"meta": Meta(scope="rank")})
        method.setup(data, ctx, method.optimizers)
        out = method(shifted, clock(0))
        assert (bool(out.skip), float(out.logs["meta/empty_steps"])) == (other_is_empty, 1.0)


class Beside(DistContext):
    """The first of two ranks; of a row that is asked for, the other one gives a 1 or a 0."""

    def __init__(self, other: bool) -> None:
        super().__init__(rank=0, world=2)
        self.other = float(other)

    def gather_rows(self, values, most):
        return torch.stack([values, torch.full_like(values, self.other)])


def test_the_weights_that_are_used_say_whether_a_step_is_skipped(tmp_path):
    data = toy_data(tmp_path)
    method = make(data, method="proposal", weights="clamp", alternate=True, drop_last=True, batch_size=2)
    disagree, agree = -torch.ones(2), torch.ones(2)
    for step, agreement, is_empty in ((0, disagree, True), (1, agree, True), (2, agree, False), (3, disagree, False)):
        weight, _, empty = method.judge(agreement, 0.1, clock(step))  # odd steps have the weights of the step before
        assert (bool(empty.all()), bool((weight == 0).all())) == (is_empty, is_empty)
        method.after_step(clock(step), DistContext())


@pytest.mark.parametrize("epsilon", [0, 1e-10])
def test_steps_without_a_weight_leave_the_network_alone_but_as_published(tmp_path, epsilon):
    data = toy_data(tmp_path / "data")
    data.train.labels[:], data.meta_set.labels[:] = 0, 1  # no image agrees with a trusted one: they look too much alike
    keys = {"momentum": 0.9, "weight_decay": 0.1, "epochs": 3, "batch_size": 5, "epsilon": epsilon}
    network = Classifier(nn.Flatten(), nn.Linear(64, 2, bias=False))
    before = network.head.weight.detach().clone()
    with pytest.raises(Stopped):  # a skipped step is gone on from, too
        run_fit(settings(method="reweight", **keys), data, tmp_path, network=network, stop=StopAfter(2))
    method = build_method("reweight", network, settings(method="reweight", **keys))
    run = Execution(DistContext(), Checkpointer(tmp_path, "k"), tmp_path)
    state = fit(method.cfg, method, data, run)
    assert (method.memory()["weight"] == 0).all()
    assert torch.equal(network.head.weight, before) == (epsilon == 0)
    assert bool(method.optimizers["network"].state) == (epsilon > 0)
    said = "they were skipped" if epsilon == 0 else "its images taught nothing"
    assert method.notes() == [f"all weights were 0 in {state.step} steps: {said}"]


def test_scales_before_the_sigmoid():
    a = torch.tensor([1.0, 2.0, 3.0])
    assert rescaled(a, "none", 0.1).tolist() == [1, 2, 3]
    assert rescaled(a, "lr", 0.5).tolist() == [2, 4, 6]
    assert rescaled(a, "std", 0.5).tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    assert rescaled(torch.full((3,), 0.7), "std", 0.5).tolist() == [0, 0, 0]


def test_normalised_weights():
    assert normalised(torch.tensor([1.0, 3.0]), 0.0).tolist() == [0.5, 1.5]
    assert normalised(torch.zeros(2), 0.0).tolist() == [0, 0]
    assert normalised(torch.zeros(2), 1e-10).tolist() == [0, 0]
    assert normalised(torch.tensor([1.0, 3.0]), 4.0).tolist() == [0.25, 0.75]
    assert normalised(torch.tensor([0.0, 1e-40]), 0.0).tolist() == [0, 2]


def test_hard_blends():
    given, trust = torch.eye(3)[[0, 1, 2]], torch.tensor([0.25, 0.5, 1.0])
    predicted = torch.tensor([2, 0, 0])
    assert blend_hard(given, predicted, trust, "loss").tolist() == [[0.25, 0, 0.75], [0.5, 0.5, 0], [0, 0, 1]]
    assert blend_hard(given, predicted, trust, "choose").argmax(1).tolist() == [2, 1, 2]
    assert blend_hard(given, predicted, trust, "index").argmax(1).tolist() == [1, 0, 2]  # 1.5, 0.5, 2


VARIANTS: dict[str, dict[str, Any]] = {
    "clamp": {"method": "reweight"},
    "sigmoid": {"method": "reweight", "weights": "sigmoid"},
    "hard": {"method": "refurbish", "targets": "hard"},
    "soft": {"method": "refurbish"},
    "proposal": {"method": "proposal"},
    "proposal soft": {"method": "proposal", "targets": "soft"},
    "upper bound": {"method": "upper_bound", "workers": 1},
    "upper bound soft": {"method": "upper_bound", "targets": "soft"},
}
PUBLISHED = {"mode": "as_published", "meta": {"size": 3}}
VARIANTS |= {f"published {name}": {**block, **PUBLISHED} for name, block in VARIANTS.items()}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("stop_at", [2, 6])  # stopped a step later: in the first epoch and in the second
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(tmp_path, name, stop_at):
    cfg = settings(**{"epochs": 3, "batch_size": 5, "momentum": 0.9, **VARIANTS[name]})
    data = toy_data(tmp_path / "data", augment=Augment(flip=0.5, rotate=10), flip_every=3)
    whole, state = run_fit(cfg, data, tmp_path / "whole", with_memory=True)
    assert (stop_at + 1) % (state.step // 3)  # not at an epoch's end
    with pytest.raises(Stopped, match=f"after step {stop_at + 1} of"):
        run_fit(cfg, data, tmp_path / "parts", stop=StopAfter(stop_at))
    resumed, _ = run_fit(cfg, data, tmp_path / "parts", network=tiny_network(seed=9), with_memory=True)
    assert is_same(whole, resumed)
    assert not whole["memory.predicted"].isnan().all()


@pytest.mark.parametrize("name", [name for name in VARIANTS if "published" not in name])
def test_bf16_is_for_the_network_alone(tmp_path, name):
    data = toy_data(tmp_path / "data", flip_every=3)
    cfg = settings(**{**VARIANTS[name], "precision": "bf16"})
    found, state = run_fit(cfg, data, tmp_path / "work", with_memory=True)
    assert all(value.dtype == torch.float32 for value in found.values() if value.is_floating_point())
    if "memory.targets" in found:
        torch.testing.assert_close(found["memory.targets"].sum(1), torch.ones(21), rtol=0, atol=1e-6)
    whole, full = run_fit(cfg.model_copy(update={"precision": "fp32"}), data, tmp_path / "full", with_memory=True)
    assert 0 < abs(state.last["loss"] - full.last["loss"]) < 0.05
    for column in ("weight", "trust"):
        if (key := f"memory.{column}") in found:
            torch.testing.assert_close(found[key], whole[key], rtol=0, atol=0.5)


def test_trusted_images_of_a_step():
    cfg = settings(method="reweight", meta={"size": 4})
    plan = MetaPlan(cfg, 6, rank=0)
    seen = [int(row) for step in range(3) for row in plan.rows(step)[0]]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]
    assert plan.rows(2)[0].tolist() == MetaPlan(cfg, 6, rank=3).rows(2)[0].tolist()
    own = settings(method="reweight", meta={"size": 4, "scope": "rank"}, sync_bn=False)
    assert [MetaPlan(own, 60, rank=r).rows(0)[0].tolist() for r in (0, 0, 1)].count(
        MetaPlan(own, 60, rank=0).rows(0)[0].tolist()
    ) == 2
    once = MetaPlan(settings(method="reweight", meta={"size": 4, "refresh": "once"}), 6, rank=0)
    assert once.rows(0)[0].tolist() == once.rows(5)[0].tolist()
    assert once.rows(0)[1] == once.rows(5)[1]
    assert len(MetaPlan(settings(method="reweight", meta={"size": None}), 6, rank=0).rows(3)[0]) == 6
    assert MetaPlan(settings(method="reweight", seed=1), 6, 0).rows(0)[0].tolist() != plan.rows(0)[0].tolist()


@pytest.mark.parametrize("refresh", ["each_step", "once"])
@pytest.mark.parametrize("workers", [0, 2])
def test_trusted_batches_depend_on_the_step_alone(tmp_path, refresh, workers):
    data = toy_data(tmp_path, augment=Augment(rotate=90))
    cfg = settings(method="reweight", meta={"size": 6, "refresh": refresh}, workers=workers)

    def batches(start):
        parts = Parts(Plan(cfg, len(data.train), 1), data, 0, build_method("reweight", tiny_network(), cfg))
        return [batch.meta for batch in training_parts(parts, start, workers, pin=False)]

    whole, rest = batches(0), batches(4)
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[4:], rest, strict=True))
    assert torch.equal(whole[0].images, whole[1].images) == (refresh == "once")
    assert set(whole[0].positions.tolist()) <= set(data.meta_set.positions.tolist())
    assert torch.equal(whole[0].labels, whole[0].positions % 2)
    by_position = [dict(zip(b.positions.tolist(), b.images, strict=True)) for b in whole[:2]]
    shown = next(iter(by_position[0]))  # size is the whole set: each image is in each batch, changed anew
    assert torch.equal(by_position[0][shown], by_position[1][shown]) == (refresh == "once")


@pytest.mark.parametrize(
    ("size", "n", "message"),
    [
        (5, 0, "reweight needs trusted images and the split has none: set `meta_set`"),
        (7, 6, "at most the 6 images .* got 7"),
    ],
)
def test_too_few_trusted_images(size, n, message):
    with pytest.raises(ConfigError, match=message):
        MetaPlan(settings(method="reweight", meta={"size": size}), n, rank=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "reweight", "accumulate": 2}, "accumulate: need 1, since weights rest on the whole batch, got 2"),
        ({"method": "refurbish", "meta": {"scope": "rank"}}, "meta.scope: rank makes the number of ranks matter"),
        ({"method": "proposal", "alternate": True}, "alternate: needs `drop_last: true`"),
    ],
)
def test_settings_that_contradict(changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(**changes)


def test_published_presets():
    soft = settings(method="refurbish", mode="as_published")
    assert (soft.targets, soft.clip_norm, soft.meta.refresh, soft.reduction) == ("soft", None, "each_step", "sum")
    hard = settings(method="refurbish", targets="hard", mode="as_published", meta={"size": 2})
    assert (hard.blend, hard.clip_norm, hard.meta.refresh, hard.meta.size, hard.meta.scope) == (
        "index", 0.25, "once", 2, "rank"
    )  # fmt: skip
    both = settings(method="proposal", mode="as_published")
    assert (both.alternate, both.weights, both.rescale, both.epsilon, both.drop_last) == (
        True,
        "sigmoid",
        "none",
        0,
        True,
    )
    assert settings(method="reweight", mode="as_published").epsilon == 1e-10
    assert settings(method="reweight").rescale == "std"
