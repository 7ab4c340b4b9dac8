"""What every method must hold to; the equality of two ranks is tested in tests/train/test_distributed.py."""

import copy

import pytest
import torch

from medmask.errors import ConfigError, Stopped
from medmask.methods import METHODS, build_method
from medmask.methods.base import Batch, Clock, Method
from medmask.train.distributed import DistContext
from medmask.train.optim import build_optimizers
from tests.toy import StopAfter, is_same, run_fit, settings, tiny_network, toy_data

CLOCK = Clock(step=0, step_in_epoch=0, epoch=0, progress=0.0)


@pytest.fixture(params=sorted(METHODS))
def name(request):
    return request.param


def batch_of(n: int = 6) -> Batch:
    labels = torch.arange(n) % 2
    images = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(
        images, labels, torch.arange(n), true_labels=labels, meta=Batch(images[:2], labels[:2], torch.arange(2))
    )


@pytest.fixture
def make(name, tmp_path):
    def make(seed: int = 0) -> Method:
        cfg = settings(method=name)
        method = build_method(name, tiny_network(seed), cfg)
        method.setup(toy_data(tmp_path / "data"), DistContext(), build_optimizers(cfg, method.param_groups()))
        return method

    return make


def test_it_is_flat(name):
    assert METHODS[name].__mro__[1] is Method


def test_loss_is_a_finite_scalar_and_every_group_gets_gradients(make):
    method = make().train()
    groups = method.param_groups()
    out = method(batch_of(), CLOCK)
    assert out.loss.shape == ()
    assert out.loss.isfinite()
    out.loss.backward()
    for group in groups.values():
        assert group
        assert all(p.grad is not None and p.grad.abs().sum() >= 0 for p in group)
        assert any(p.grad.abs().sum() > 0 for p in group)
    everything = [id(p) for group in groups.values() for p in group]
    assert len(everything) == len(set(everything))


def test_state_round_trips(make):
    first, second = make(seed=0), make(seed=1)
    assert not is_same(first.state_dict(), second.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert is_same(first.state_dict(), second.state_dict())


def test_numbers_of_each_image_and_probabilities(make):
    method = make().eval()
    batch = batch_of()
    numbers = method.validation_step(batch)
    assert {key: tuple(value.shape) for key, value in numbers.items()} == {"loss": (6,), "predicted": (6,)}
    probs = method.predict(batch.images)
    assert probs.shape == (6, 2)
    torch.testing.assert_close(probs.sum(1), torch.ones(6))
    assert torch.equal(probs.argmax(1), numbers["predicted"])


def test_export_has_the_names_of_a_classifier(make):
    tiny_network().load_state_dict(make().export())


def test_a_tiny_set_is_learned_by_heart(name, tmp_path):
    cfg = settings(method=name, epochs=30, batch_size=7, lr=0.1)
    _, state = run_fit(cfg, toy_data(tmp_path), tmp_path / "work")
    assert state.last["accuracy"] == 1.0
    assert state.last["loss"] < (0.3 if name == "refurbish" else 0.1)  # its soft labels keep some of early predictions


def test_stopped_in_the_middle_of_an_epoch_it_ends_with_the_same_bits(name, tmp_path):
    cfg = settings(method=name, epochs=2, batch_size=5, momentum=0.9)
    data = toy_data(tmp_path, flip_every=3)
    whole, state = run_fit(cfg, data, tmp_path / "whole", with_memory=True)
    with pytest.raises(Stopped, match=rf"after step 3 of {state.step}"):
        run_fit(cfg, data, tmp_path / "parts", stop=StopAfter(2))
    assert state.step // 2 > 3
    assert is_same(whole, run_fit(cfg, data, tmp_path / "parts", network=tiny_network(seed=9), with_memory=True)[0])


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ConfigError, match="method: unknown name 'superwised'; did you mean 'supervised'"):
        build_method("superwised", tiny_network(), settings())
