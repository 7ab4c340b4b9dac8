"""Batches are a function of settings and step: not of ranks, workers, or where a run was resumed."""

import numpy as np
import pytest
import torch

from medmask.config.training import Augment
from medmask.errors import ConfigError
from medmask.methods.supervised import Supervised
from medmask.train.loader import Parts, Plan, training_parts
from tests.toy import settings, toy_data


def images_of(cfg, data, *, rank=0, world=1, start=0):
    parts = Parts(Plan(cfg, len(data.train), world), data, rank, Supervised)
    return list(training_parts(parts, start, cfg.workers, pin=False))


def test_orders():
    n = 10
    plan = Plan(settings(), n, 1)
    assert sorted(plan.order(0)) == list(range(n))
    assert plan.order(0).tolist() == np.random.default_rng([0, 0]).permutation(n).tolist()
    assert plan.order(0).tolist() != plan.order(1).tolist()
    fixed = Plan(settings(order="fixed"), n, 1)
    assert fixed.order(0).tolist() == fixed.order(5).tolist() != list(range(n))
    assert fixed.order(0).tolist() != Plan(settings(order="fixed", seed=1), n, 1).order(0).tolist()
    assert Plan(settings(order="file"), n, 1).order(3).tolist() == list(range(n))


@pytest.mark.parametrize(
    ("n", "changes", "sizes"),
    [
        (16, {}, [8, 8]),
        (17, {}, [8, 8]),  # one image alone has no batch statistics
        (18, {}, [8, 8, 2]),
        (18, {"drop_last": True}, [8, 8]),
        (5, {}, [5]),
    ],
)
def test_steps_of_an_epoch(n, changes, sizes):
    plan = Plan(settings(**changes), n, 1)
    assert [len(plan.span(step)) for step in range(plan.steps)] == sizes


def test_steps_published_for_masked_mnist():
    assert Plan(settings(batch_size=128), 60_000, 1).steps == 469
    assert Plan(settings(batch_size=128), 48_000, 1).steps == 375


@pytest.mark.parametrize(
    ("n", "world", "changes", "message"),
    [
        (19, 4, {}, "the last batch of an epoch has 3 images in 1 parts, but 4 ranks need 4 .*drop_last: true"),
        (19, 2, {"sync_bn": False, "ranks": 2}, "2 ranks need 4 images a part"),
        (16, 1, {"batch_size": 1}, "a batch has 1 images in 1 parts, but 1 ranks need 2"),
        (16, 4, {"accumulate": 4}, "a batch has 8 images in 4 parts"),
        (5, 1, {"drop_last": True}, "5 training images give no batch of 8"),
        (1, 1, {}, "1 training images give no batch"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(n, world, changes, message):
    with pytest.raises(ConfigError, match=message):
        Plan(settings(**changes), n, world)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_see_the_batches_of_one(tmp_path, accumulate):
    data = toy_data(tmp_path, augment=Augment(flip=0.5, rotate=20, crop_scale=(0.5, 1)))
    cfg = settings(accumulate=accumulate, batch_size=6)
    alone = images_of(cfg, data)
    shares = [images_of(cfg, data, rank=rank, world=2) for rank in range(2)]
    assert len(alone) == len(shares[0]) == 2 * 4 * accumulate - 2 * (accumulate - 1)  # the last batch has 3 images
    for whole, *pair in zip(alone, *shares, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in pair]))
        assert torch.equal(whole.labels, torch.cat([part.labels for part in pair]))


def test_workers_and_resuming_change_nothing(tmp_path):
    data = toy_data(tmp_path, augment=Augment(flip=0.5))
    alone = images_of(settings(), data)
    helped = images_of(settings(workers=2), data)
    later = images_of(settings(), data, start=2)
    assert [part.positions.tolist() for part in alone] == [part.positions.tolist() for part in helped]
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, helped, strict=True))
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone[2:], later, strict=True))


def test_an_epoch_has_every_image_once_and_other_changes_than_the_one_before(tmp_path):
    data = toy_data(tmp_path, augment=Augment(flip=0.5))
    batches = images_of(settings(order="file"), data)
    half = len(batches) // 2
    first, second = (torch.cat([b.images for b in part]) for part in (batches[:half], batches[half:]))
    assert torch.cat([b.positions for b in batches[:half]]).tolist() == list(range(21))
    is_changed = [not torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert 3 < sum(is_changed) < 18
