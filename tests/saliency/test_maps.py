"""Saliency maps by hand, against pytorch-grad-cam, and the layers they explain."""

import pytest
import torch
from torch import nn

from medmask.errors import ConfigError
from medmask.models.backbones import Classifier, build_backbone
from medmask.saliency.layers import find_layer, spatial_layers
from medmask.saliency.maps import Explainer, gradcam, resized, scaled, xgradcam
from tests.toy import tiny_network


def classifier(name: str, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    backbone = build_backbone(name, 3)
    network = Classifier(backbone, nn.Linear(backbone.width, 3))
    with torch.no_grad():  # running statistics that are not those of an untrained network
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return network.eval()


def test_weights_by_hand():
    activation, gradient = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2), torch.tensor([2.0, 2.0]).view(1, 1, 1, 2)
    assert xgradcam(activation, gradient, 0.0).item() == 2.0
    assert gradcam(activation, gradient, 0.0).item() == 2.0
    gradient = torch.tensor([0.0, 4.0]).view(1, 1, 1, 2)
    assert xgradcam(activation, gradient, 0.0).item() == 3.0
    assert gradcam(activation, gradient, 0.0).item() == 2.0
    assert xgradcam(torch.zeros(1, 1, 1, 2), gradient, 1e-8).item() == 0.0


def test_scaling():
    maps = torch.tensor([[[1.0, 3.0]], [[2.0, 2.0]], [[0.0, 0.0]]])
    assert scaled(maps).tolist() == [[[0.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]]
    large = resized(torch.rand(2, 4, 4), 9, 7)
    assert large.shape == (2, 9, 7)
    assert large.amin((1, 2)).tolist() == [0, 0]
    assert large.amax((1, 2)).tolist() == [1, 1]


@pytest.mark.parametrize("method", ["xgradcam", "gradcam"])
@pytest.mark.parametrize(("backbone", "side"), [("small_cnn", 28), ("resnet18", 64)])
@pytest.mark.parametrize("target", ["given", "predicted"])
def test_equal_to_pytorch_grad_cam(method, backbone, side, target):
    cams = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed: pip install grad-cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    network, images = classifier(backbone), torch.randn(6, 3, side, side)
    # ResNet's last ReLU is called twice in its block: the output of the block is that of the second call
    theirs = network.get_submodule("backbone.12" if backbone == "small_cnn" else "backbone.layer4")
    name, layer = find_layer(network, "last_relu", images[:1])
    assert name == ("backbone.12" if backbone == "small_cnn" else "backbone.layer4.1.relu")
    classes = torch.tensor([0, 1, 2, 0, 1, 2]) if target == "given" else None
    ours, logits = Explainer(network, layer, method, epsilon=1e-7)(images, classes)
    assert torch.equal(logits, network(images))
    library = {"xgradcam": cams.XGradCAM, "gradcam": cams.GradCAM}[method]
    with library(model=network, target_layers=[theirs]) as cam:
        wanted = None if classes is None else [ClassifierOutputTarget(int(k)) for k in classes]
        outputs = cam.activations_and_grads(images)
        wanted = wanted or [ClassifierOutputTarget(int(k)) for k in outputs.argmax(1)]
        network.zero_grad()
        sum(one(out) for one, out in zip(wanted, outputs, strict=True)).backward()
        activations = cam.activations_and_grads.activations[0].numpy()
        gradients = cam.activations_and_grads.gradients[0].numpy()
        raw = cam.get_cam_image(images, theirs, wanted, activations, gradients, False)
    expected = scaled(torch.from_numpy(raw).clamp(min=0))
    assert expected.amax((1, 2)).min() > 0.5  # the maps say something
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_batches_and_single_images_agree_and_nothing_stays():
    network, images = classifier("small_cnn"), torch.randn(5, 3, 28, 28)
    explain = Explainer(network, network.backbone[12], "xgradcam")
    together, _ = explain(images, torch.arange(5) % 3)
    assert together.shape == (5, 8, 8)
    single = torch.cat([explain(images[i : i + 1], torch.tensor([i % 3]))[0] for i in range(5)])
    torch.testing.assert_close(together, single, rtol=0, atol=1e-5)
    assert not network.backbone[12]._forward_hooks
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in network.parameters())


def test_a_layer_followed_by_work_in_place():
    network, images = classifier("resnet18"), torch.randn(2, 3, 64, 64)
    maps, logits = Explainer(network, network.get_submodule("backbone.layer4.1.bn2"), "gradcam")(images)
    assert maps.shape == (2, 2, 2)
    assert torch.equal(logits, network(images))


def test_layers():
    network = tiny_network().eval()
    names = spatial_layers(network, torch.zeros(1, 1, 8, 8))
    assert names == [f"backbone.{i}" for i in range(5)]
    assert find_layer(network, "last_relu", torch.zeros(1, 1, 8, 8))[0] == "backbone.2"
    assert find_layer(network, "backbone.0", torch.zeros(1, 1, 8, 8))[0] == "backbone.0"
    with pytest.raises(ConfigError, match=r"no layer 'backbone.9' .*did you mean 'backbone.\d'.*choices: backbone.0, "):
        find_layer(network, "backbone.9", torch.zeros(1, 1, 8, 8))
    with pytest.raises(ConfigError, match="no layer whose output is a map"):
        find_layer(nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU()), "last_relu", torch.zeros(1, 1, 2, 2))
    with pytest.raises(ConfigError, match=r"no activation whose output is a map; name a layer, .*0"):
        find_layer(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten()), "last_relu", torch.zeros(1, 1, 2, 2))
