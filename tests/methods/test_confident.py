"""Training with weights of images that do not change, by hand."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from medmask.errors import Stopped
from medmask.methods import build_method
from medmask.methods.base import Clock
from medmask.train.distributed import DistContext
from medmask.train.optim import build_optimizers
from tests.methods.test_meta_learning import batch_of
from tests.toy import StopAfter, is_same, run_fit, settings, tiny_network, toy_data

REWEIGHT = {"method": "confident", "errors": "reweight"}


def loss_of(data, places, **changes) -> tuple[float, torch.Tensor, dict]:
    """The loss of a batch, the cross-entropy of its images, and what is remembered."""
    cfg = settings(**changes)
    method = build_method(cfg.method, tiny_network(norm=False), cfg)
    method.setup(data, DistContext(), build_optimizers(cfg, method.param_groups()))
    batch = batch_of(data, places)
    losses = functional.cross_entropy(method.network(batch.images), batch.labels, reduction="none")
    return method(batch, Clock(0, 0, 0, 0.0)).loss.item(), losses.detach(), method.memory()


def test_each_image_weighs_what_it_was_given(tmp_path):
    data = toy_data(tmp_path, flip_every=3)
    loss, losses, memory = loss_of(data, [4, 2, 9], **REWEIGHT)
    weights = torch.from_numpy(data.weights)
    assert loss == pytest.approx((weights[[4, 2, 9]] * losses).mean().item(), rel=1e-6)
    torch.testing.assert_close(memory["weight"], weights.float())
    assert loss != pytest.approx(losses.mean().item(), rel=1e-3)


def test_all_weigh_the_same_where_errors_are_removed(tmp_path):
    data = toy_data(tmp_path, flip_every=3)
    loss, losses, memory = loss_of(data, [4, 2, 9], method="confident")
    assert loss == pytest.approx(losses.mean().item(), rel=1e-6)
    assert "weight" not in memory


def test_equal_weights_are_plain_training(tmp_path):
    data = replace(toy_data(tmp_path), weights=None)
    plain, _ = run_fit(settings(), data, tmp_path / "plain")
    assert is_same(plain, run_fit(settings(**REWEIGHT), data, tmp_path / "weighted")[0])
    assert is_same(plain, run_fit(settings(method="confident"), data, tmp_path / "removed")[0])


def test_weighted_training_goes_on_with_the_same_bits(tmp_path):
    data, cfg = toy_data(tmp_path, flip_every=3), settings(**REWEIGHT, epochs=2, batch_size=5)
    whole, _ = run_fit(cfg, data, tmp_path / "whole", with_memory=True)
    with pytest.raises(Stopped, match="after step 3 of"):  # in the first epoch
        run_fit(cfg, data, tmp_path / "parts", stop=StopAfter(2))
    assert is_same(whole, run_fit(cfg, data, tmp_path / "parts", with_memory=True)[0])
