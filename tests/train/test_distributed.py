"""Two gloo processes, and four, compute what one does; all of it in one start of each number."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from medmask.errors import ConfigError, LaunchError
from medmask.methods import build_method
from medmask.methods.base import Clock
from medmask.train.batchnorm import GlobalBatchNorm, convert_batchnorm
from medmask.train.distributed import DistContext, choose_device, distributed
from medmask.train.loader import Parts, Plan
from medmask.train.optim import build_optimizers
from tests.toy import is_same, run_fit, run_ranks, settings, tiny_network, toy_data
from tests.train.ranks import ALONE, FOUR, ONE_STEP, STOPPED, TRAININGS, norm_images, norm_loss, norm_network, train_all


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks has found, and what one process finds."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks("tests.train.ranks", folder), train_all(folder, DistContext()), folder


def test_batch_norm_over_ranks_has_the_gradients_of_one_process(ranks):
    (first, second), _, _ = ranks
    network, images = norm_network(), norm_images()
    norm_loss(network(images)).backward()
    expected = {name: p.grad for name, p in network.named_parameters()}
    expected |= {name: buffer.clone() for name, buffer in network.named_buffers()}
    with forward_ad.dual_level():
        tangents = torch.ones_like(images)
        tangents[:3], tangents[3:] = tangents[:3].cumsum(0), tangents[3:].cumsum(0) + 3
        dual = forward_ad.make_dual(images, tangents)
        expected["jvp"] = forward_ad.unpack_dual(norm_loss(network(dual))).tangent
    assert first["norm"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(first["norm"][name], value, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(second["norm"][name], value, rtol=1e-10, atol=1e-10)


def test_ranks_end_with_equal_weights(ranks):
    (first, second), _, _ = ranks
    assert all(is_same(first[name], second[name]) for name in first)


def test_two_ranks_end_with_the_weights_of_one(ranks):
    (first, _), alone, _ = ranks
    assert set(first) - set(alone) == {
        *("norm", "own statistics", ALONE, ONE_STEP, "published reweight", "published proposal")
    }
    for name, expected in alone.items():
        for key, value in expected.items():
            is_close = torch.allclose(first[name][key], value, rtol=1e-4, atol=1e-5, equal_nan=True)
            assert is_close, f"{name}, {key}: {first[name][key]}, not {value}"


def test_four_ranks_end_with_the_weights_of_one(ranks, tmp_path):
    _, alone, _ = ranks
    first, *others = run_ranks("tests.train.ranks", tmp_path, 4)
    assert first.keys() == set(FOUR)
    for name in FOUR:
        assert all(is_same(first[name], other[name]) for other in others)
        for key, value in alone[name].items():
            torch.testing.assert_close(first[name][key], value, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_as_published_each_rank_weighs_its_own_images_by_its_own_trusted_ones(ranks, tmp_path):
    (first, _), _, _ = ranks
    cfg, data = settings(**TRAININGS[ONE_STEP]), toy_data(tmp_path, flip_every=3)
    gradients, trusted = [], []
    for rank in range(2):
        network = tiny_network()
        method = build_method("reweight", network, cfg).to(memory_format=torch.channels_last).train()
        method.setup(data, DistContext(), build_optimizers(cfg, method.param_groups()))
        batch = Parts(Plan(cfg, 21, 2), data, rank, method)[0, 0, 0]
        method(batch, Clock(0, 0, 0, 0.0)).loss.backward()
        gradients.append([p.grad for p in network.parameters()])
        trusted.append(sorted(batch.meta.positions.tolist()))
    assert trusted[0] != trusted[1]
    for (name, p), *both in zip(network.named_parameters(), *gradients, strict=True):
        step = cfg.lr * (sum(both) / 2 + cfg.weight_decay * p)
        torch.testing.assert_close(first[ONE_STEP][name], (p - step).detach(), rtol=1e-4, atol=1e-6)


def test_two_ranks_that_are_stopped_go_on_with_the_same_bits(ranks):
    (first, _), _, _ = ranks
    assert is_same(first[STOPPED], first["method refurbish"])
    assert "memory.targets" in first[STOPPED]


def test_soft_labels_go_on_with_another_number_of_ranks(ranks, tmp_path):
    _, alone, folder = ranks
    cfg = settings(**{"batch_size": 9, **TRAININGS[STOPPED]})
    assert [path.name for path in (folder / "moved").glob("checkpoint-*.pt")] == ["checkpoint-000000002.pt"]
    found, state = run_fit(cfg, toy_data(tmp_path, flip_every=3), folder / "moved", with_memory=True)
    assert state.step == 6
    for key, value in alone["method refurbish"].items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, equal_nan=True)


def shares_of_weight(weights, name):
    """Sum of weights over their number, by step of the last epoch and by rank, (steps, 2)."""
    plan = Plan(settings(**{"batch_size": 9, **TRAININGS[name]}), 21, 2)
    order = plan.order(1)
    rows = [[plan.rows(order, step, 0, rank) for rank in range(2)] for step in range(plan.steps)]
    return np.array([[float(weights[each].mean()) for each in step] for step in rows])


def test_weights_are_normalised_over_all_ranks_or_as_published_by_each(ranks):
    (first, _), _, _ = ranks
    published = shares_of_weight(first["published reweight"]["memory.weight"], "published reweight")
    assert published == pytest.approx(np.ones((2, 2)), abs=1e-5)
    corrected = shares_of_weight(first["method reweight"]["memory.weight"], "method reweight")
    assert np.abs(corrected - 1).max() > 0.1
    whole = (corrected * [[4, 5], [4, 5], [1, 2]]).sum(1) / [9, 9, 3]
    assert whole == pytest.approx(np.where(whole > 0, 1, 0), abs=1e-5)
    assert (whole > 0).any()


def test_a_step_is_skipped_only_where_no_rank_has_a_weight(ranks):
    (first, second), _, _ = ranks
    shares = shares_of_weight(first[ALONE]["memory.weight"], ALONE)
    assert (shares.round(4) == [0, 1]).all(1).any()  # here one rank alone has none
    assert is_same(first[ALONE], second[ALONE])


def test_own_statistics_make_a_difference(ranks):
    (first, _), alone, _ = ranks
    key = "backbone.1.running_var"
    assert not torch.allclose(first["own statistics"][key], alone["method supervised"][key], rtol=1e-4)


def test_conversion_keeps_parameters_buffers_and_names():
    network = tiny_network()
    twin = copy.deepcopy(network)
    before = dict(twin.named_parameters())
    convert_batchnorm(twin, torch.device("cpu"))
    assert isinstance(twin.backbone[1], GlobalBatchNorm)
    assert all(parameter is before[name] for name, parameter in twin.named_parameters())
    assert is_same(network.state_dict(), twin.state_dict())
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(network(images), twin(images))  # one process: plain batch norm


def test_frozen_layers_stay_marked_and_a_gpu_gets_the_norm_of_torch():
    network = tiny_network()
    network.backbone[1].is_frozen = True
    convert_batchnorm(network, torch.device("cuda"))
    assert isinstance(network.backbone[1], nn.SyncBatchNorm)
    assert network.backbone[1].is_frozen
    network = tiny_network()
    convert_batchnorm(network, torch.device("cuda"), forward_mode=True)
    assert isinstance(network.backbone[1], GlobalBatchNorm)


def test_a_batch_norm_that_does_more_is_refused():
    class WithActivation(nn.BatchNorm2d):
        pass

    with pytest.raises(ConfigError, match="sync_bn: cannot be had with layers of type WithActivation"):
        convert_batchnorm(nn.Sequential(WithActivation(3)), torch.device("cpu"))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR or MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: need a number, got 'two'"),
    ],
)
def test_a_broken_environment_is_refused(environ, message):
    with pytest.raises(LaunchError, match=message), distributed(False, environ):
        pass


def test_one_process_needs_no_environment():
    with distributed(False, {}) as ctx:
        assert (ctx.rank, ctx.world, ctx.is_main, ctx.device.type) == (0, 1, True, "cpu")
    assert choose_device(wants_gpu=False, local_rank=3).type == "cpu"
