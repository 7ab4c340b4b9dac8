"""Cross-entropy by hand."""

import math

import pytest
import torch
from torch import nn

from medmask.methods.base import Batch, Clock
from medmask.methods.supervised import Supervised
from medmask.models.backbones import Classifier
from tests.toy import settings


def test_loss_by_hand():
    network = Classifier(nn.Flatten(), nn.Linear(1, 2, bias=False))
    network.head.weight.data = torch.tensor([[0.0], [1.0]])
    method = Supervised(network, settings())
    images = torch.tensor([math.log(3), 0.0]).view(2, 1, 1, 1)  # probabilities of class 1: 3/4, 1/2
    batch = Batch(images, torch.tensor([1, 0]), torch.arange(2))
    each = [-math.log(3 / 4), -math.log(1 / 2)]
    numbers = method.validation_step(batch)
    assert numbers["loss"].tolist() == pytest.approx(each)
    assert numbers["predicted"].tolist() == [1, 0]
    assert float(method(batch, Clock(0, 0, 0, 0.0)).loss.detach()) == pytest.approx(sum(each) / 2)
    assert method.predict(images)[0].tolist() == pytest.approx([1 / 4, 3 / 4])


def test_frozen_parameters_are_in_no_group():
    network = Classifier(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    assert Supervised(network, settings()).param_groups()["network"] == list(network.head.parameters())
