"""What does learning to reweight cost above plain training? As a script: the peak memory of one way, in MiB."""

import statistics
import sys
from pathlib import Path

import torch
from torch.func import functional_call
from torch.nn import functional

from bench.conftest import lines
from medmask.methods.meta_gradient import (
    agreement_of,
    clean_direction,
    copied_buffers,
    forward_with_last_layer_tangents,
    forward_with_tangents,
)

CASE = "ResNet-18, 64x64, batch 32, 5 clean images"
EXACT, PLAIN = f"a reweighting step ({CASE})", "a plain SGD step"


class Bench:
    """A network, its optimizer and the batches; each method is one whole training step."""

    def __init__(self) -> None:
        from torchvision.models import resnet18

        torch.manual_seed(0)
        pack = {"memory_format": torch.channels_last}
        self.network = resnet18(num_classes=9).to(**pack).train()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-3, weight_decay=1e-4)
        self.images, self.clean_images = torch.randn(32, 3, 64, 64).to(**pack), torch.randn(5, 3, 64, 64).to(**pack)
        self.labels, self.clean_labels = torch.randint(9, (32,)), torch.randint(9, (5,))

    def losses(self, logits):
        return functional.cross_entropy(logits, self.labels, reduction="none")

    def update(self, loss) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # as `fit`, which has no gradients left when a step begins

    def reweight(self, logits, agreement) -> None:
        weights = agreement.clamp(min=0)
        self.update((weights / (weights.sum() + 1e-10) * self.losses(logits)).sum())

    def plain(self) -> None:
        self.update(functional.cross_entropy(self.network(self.images), self.labels))

    def exact_agreement(self):
        direction = clean_direction(self.network, self.optimizer, self.clean_images, self.clean_labels)
        logits, tangents = forward_with_tangents(self.network, self.images, direction)
        del direction
        return logits, agreement_of(self.losses, logits, tangents)

    def last_layer_agreement(self):
        clean = self.clean_images, self.clean_labels
        logits, tangents = forward_with_last_layer_tangents(self.network, self.optimizer, self.images, *clean)
        return logits, agreement_of(self.losses, logits, tangents)

    def exact(self) -> None:
        self.reweight(*self.exact_agreement())

    def last_layer(self) -> None:
        self.reweight(*self.last_layer_agreement())

    def unrolled(self) -> None:
        parameters = dict(self.network.named_parameters())
        buffers = copied_buffers(self.network)
        weights = torch.zeros(32, requires_grad=True)
        loss = (weights * self.losses(functional_call(self.network, buffers, self.images))).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        moved = {
            name: parameter - 1e-3 * (gradient + 1e-4 * parameter)
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        }
        logits = functional_call(self.network, {**moved, **buffers}, self.clean_images)
        agreement = -torch.autograd.grad(functional.cross_entropy(logits, self.clean_labels), weights)[0]
        del loss, gradients, moved, logits
        self.reweight(self.network(self.images), agreement)


def test_time(compare):
    bench = Bench()
    ratio = compare(f"{EXACT} above {PLAIN}; by operations 1.82", bench.exact, bench.plain, "a step")
    compare("the same by an unrolled step", bench.unrolled, bench.plain, "a step")
    compare("the same by the gradients of the last layer, an approximation", bench.last_layer, bench.plain, "a step")
    assert ratio < 2.3


def test_signs_of_the_last_layer():
    """Real digits at 64 pixels, 40 % of the training labels at random; looked at in every fifth of 60 plain steps."""
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    bench, draw = Bench(), torch.Generator().manual_seed(0)
    bench.optimizer = torch.optim.SGD(bench.network.parameters(), lr=0.02, momentum=0.9)
    pixels, labels = load_digits(n_class=9, return_X_y=True)
    images, labels = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    is_random = torch.rand(len(labels), generator=draw) < 0.4
    noisy = torch.where(is_random, torch.randint(9, labels.shape, generator=draw), labels)

    def batch(n, from_labels):
        rows = torch.randint(len(labels), (n,), generator=draw)
        return functional.interpolate(images[rows], 64).expand(-1, 3, -1, -1), from_labels[rows]

    shares = []
    for step in range(61):
        bench.images, bench.labels = batch(32, noisy)
        bench.clean_images, bench.clean_labels = batch(5, labels)
        if step >= 10 and step % 5 == 0:
            exact, other = (found.sign() for _, found in (bench.exact_agreement(), bench.last_layer_agreement()))
            shares.append(float((exact == other).float().mean()))
        bench.plain()
    middle, spread = statistics.median(shares), f"{min(shares):.2f} to {max(shares):.2f}, {len(shares)} steps"
    lines.append(
        f"| share of images for which the last layer gives the sign of the exact one | {middle:.2f} | {spread} | |"
    )
    assert middle > 0.8


def test_memory(compare_processes):
    module = "bench.test_meta_gradient"
    compare_processes(f"peak memory of {EXACT} above {PLAIN}", (module, "exact"), (module, "plain"))
    ratio = compare_processes("the same above an unrolled step", (module, "exact"), (module, "unrolled"))
    assert ratio < 0.7


def memory(name: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps = Bench()
    before = memory("VmRSS")
    for _ in range(3):
        getattr(steps, sys.argv[1])()
    print((memory("VmHWM") - before) / 1024)
