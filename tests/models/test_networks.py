"""Backbones, heads and freezing against published parameter counts."""

import pytest
import torch
from torch import nn

from medmask.config.training import Head
from medmask.errors import ConfigError
from medmask.models.backbones import Classifier, build_backbone, width_of
from medmask.models.freeze import freeze_stages, keep_frozen, stages_of
from medmask.models.heads import HEADS, build_head, head_settings


def count(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def test_small_cnn_is_the_published_one():
    backbone = build_backbone("small_cnn", 3)
    head = build_head(head_settings(Head(kind="mlp_bn")), width=width_of(backbone), n_classes=2)
    assert (count(backbone), count(head)) == (16_848, 132_354)
    network = Classifier(backbone, head).eval()
    activations = []
    backbone[-3].register_forward_hook(lambda module, inputs, output: activations.append(output.shape))
    assert network(torch.zeros(5, 3, 28, 28)).shape == (5, 2)
    assert isinstance(backbone[-3], nn.ReLU)
    assert activations == [(5, 32, 8, 8)]
    assert {name.split(".")[0] for name in network.state_dict()} == {"backbone", "head"}


def test_small_cnn_says_what_size_it_needs():
    with pytest.raises(ConfigError, match=r"image.size: small_cnn needs 28, got images of 8 x 8 pixels"):
        build_backbone("small_cnn", 1)(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("name", "channels", "width"),
    [("resnet18", 3, 512), ("resnet18", 1, 512), ("densenet121", 3, 1024), ("mobilenet_v3_small", 3, 1024),
     ("resnet10t", 1, 512), ("timm.resnet10t", 3, 512)],
)  # fmt: skip
def test_features_have_the_width_that_is_said(name, channels, width):
    backbone = build_backbone(name, channels).eval()
    with torch.no_grad():
        features = backbone(torch.zeros(2, channels, 64, 64))
    assert features.shape == (2, width)
    assert width_of(backbone) == width


def test_resnet10t_has_the_published_size():
    with torch.device("meta"):
        backbone = build_backbone("resnet10t", 3)
    assert round((count(backbone) + 512 * 1000 + 1000) / 1e6, 2) == 5.44  # with ImageNet's head, as timm lists it


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "backbone: unknown name 'resnet19'; did you mean 'resnet1.*choices: .*small_cnn"),
        ("timm.resnet10x", "backbone: timm has no network 'resnet10x'; close: resnet10"),
        ("squeezenet1_0", "backbone: squeezenet1_0 does not end in a linear layer"),
    ],
)
def test_unknown_backbones(name, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(name, 3)


def test_heads_are_those_of_the_config():
    assert set(HEADS) == set(Head.model_fields["kind"].annotation.__args__)
    with pytest.raises(ConfigError, match=r"head.kind: unknown name 'cone'; did you mean 'conv'"):
        build_head({"kind": "cone"}, width=4, n_classes=2)


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("linear", {}, 4_098),
        ("nonlinear", {}, 2_101_250),
        ("nonlinear", {"ratio": 1}, 4_202_498),
        ("conv", {}, 33_538_066),
        ("conv", {"filters": 16, "ratio": 1}, 1_072_824_578),
        ("convskip", {}, 50_323_466),
        ("convskip", {"filters": 16}, 603_553_922),
        ("convskip", {"filters": 16, "kernel": 4}, 602_440_738),
    ],
)
def test_heads_have_the_published_sizes(kind, settings, expected):
    with torch.device("meta"):
        head = build_head(head_settings(Head(kind=kind, **settings)), width=2048, n_classes=2)
    assert count(head) == expected


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_heads_give_scores(kind):
    head = build_head(head_settings(Head(kind=kind)), width=6, n_classes=3)
    assert head(torch.randn(4, 6)).shape == (4, 3)


@pytest.mark.parametrize(
    ("depth", "trained"),
    [("all", 0), (0, 0), (1, 14_964_736), (2, 22_063_104), (3, 23_282_688), (4, 23_498_496), (5, 23_498_624),
     (6, 23_508_032), ("none", 23_508_032)],
)  # fmt: skip
def test_trained_parameters_of_resnet50_by_depth(depth, trained):
    with torch.device("meta"):
        backbone = build_backbone("resnet50", 3)
    freeze_stages(backbone, depth)
    assert count(backbone, trained=True) == trained


def test_stages_are_found_inside_a_single_child():
    with torch.device("meta"):
        backbone = build_backbone("densenet121", 3)
    assert len(stages_of(backbone)) == 10  # conv, norm, four blocks, three transitions, norm
    with pytest.raises(ConfigError, match="freeze: need none, all, or 0 to 10 stages of this backbone, got 11"):
        freeze_stages(backbone, 11)


def test_frozen_batch_norm_keeps_its_statistics():
    network = Classifier(
        nn.Sequential(nn.Sequential(nn.BatchNorm2d(1)), nn.Sequential(nn.BatchNorm2d(1))), nn.Identity()
    )
    freeze_stages(network.backbone, 1)
    network.train()
    keep_frozen(network)
    network(torch.ones(2, 1, 2, 2))
    first, last = network.backbone[0][0], network.backbone[1][0]
    assert (float(first.running_mean), round(float(last.running_mean), 3)) == (0.0, 0.1)
