"""What does a saliency map cost above a forward pass? As a script: the peak memory of one way, in MiB."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from medmask.models.backbones import Classifier, build_backbone
from medmask.saliency.maps import Explainer

CASES = {"small_cnn": (28, 256, "backbone.12"), "resnet18": (224, 16, "backbone.layer4.1.relu")}
ROUNDS = {"small_cnn": 10, "resnet18": 1}  # batches that are timed together: one small one takes as long as its memory


class Bench:
    """A network and a batch; each method explains, or only classifies, all images once."""

    def __init__(self, name: str) -> None:
        side, n, layer = CASES[name]
        torch.manual_seed(0)
        backbone = build_backbone(name, 3)
        self.network = Classifier(backbone, nn.Linear(int(backbone.width), 2)).eval()
        self.images, self.targets = torch.rand(n, 3, side, side), torch.arange(n) % 2
        # the library runs in torch's own layout; ours, as the stage has it, with the channels last
        self.last = Classifier(self.network.backbone, self.network.head).to(memory_format=torch.channels_last)
        self.last_images = self.images.contiguous(memory_format=torch.channels_last)
        self.explain = Explainer(self.last, self.last.get_submodule(layer), "xgradcam")
        self.theirs = "backbone.12" if name == "small_cnn" else "backbone.layer4"

        self.rounds = range(ROUNDS[name])

    def forward(self) -> None:
        with torch.no_grad():
            for _ in self.rounds:
                self.last(self.last_images)

    def ours(self) -> None:
        for _ in self.rounds:
            self.explain(self.last_images, self.targets)

    def one_by_one(self) -> None:
        for image, target in zip(self.last_images[:16], self.targets[:16], strict=True):
            self.explain(image[None], target[None])

    def sixteen(self) -> None:
        self.explain(self.last_images[:16], self.targets[:16])

    def library(self) -> None:
        from pytorch_grad_cam import XGradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        with XGradCAM(model=self.network, target_layers=[self.network.get_submodule(self.theirs)]) as cam:
            for _ in self.rounds:
                cam(input_tensor=self.images, targets=[ClassifierOutputTarget(int(k)) for k in self.targets])


@pytest.mark.parametrize("name", CASES)
def test_a_map_costs_little_above_a_forward_pass(compare, name):
    bench = Bench(name)
    side, n, _ = CASES[name]
    case = f"XGradCAM maps ({name}, {side}x{side}, batch {n})"
    unit = f"{len(bench.rounds)} batches" if len(bench.rounds) > 1 else "a batch"
    assert compare(f"{case} against a forward pass without gradients", bench.ours, bench.forward, unit) <= 1.15
    pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    assert compare(f"{case} against pytorch-grad-cam", bench.ours, bench.library, unit) < 0.9


def test_batches_against_single_images(compare):
    bench = Bench("small_cnn")
    question = "XGradCAM maps of 16 images of 28x28 at once, against one by one"
    assert compare(question, bench.sixteen, bench.one_by_one, "16 images") < 0.5


def test_memory(compare_processes):
    pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    script = ("bench.test_saliency", "resnet18")
    question = "peak memory above the start, XGradCAM maps of 16 images at 224x224, against pytorch-grad-cam"
    assert compare_processes(question, (*script, "ours"), (*script, "library")) < 0.5


if __name__ == "__main__":
    torch.set_num_threads(1)

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0])

    bench = Bench(sys.argv[1])
    if sys.argv[2] == "library":
        import pytorch_grad_cam  # noqa: F401  # not counted: what it loads
    before = peak()
    getattr(bench, sys.argv[2])()
    print((peak() - before) / 1024)
