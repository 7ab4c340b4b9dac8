"""What does a training step gain where freed memory is kept? As a script: ms a step, or the peak memory in MiB."""

import resource
import sys
import time

import pytest
import torch
from torch import nn

from medmask.models.backbones import Classifier, build_backbone
from medmask.models.cores import keep_memory

CASES = {"small_cnn": (28, 128, 100), "resnet18": (224, 16, 5)}  # side, batch, steps


@pytest.mark.parametrize("name", CASES)
def test_a_step_and_its_memory(compare_processes, name):
    side, n, _ = CASES[name]
    step = f"a training step ({name}, {side}x{side}, batch {n}) with freed memory kept"
    ms, mib = ("bench.test_cores", name, "ms"), ("bench.test_cores", name, "MiB")
    assert compare_processes(step, (*ms, "kept"), ms, "ms") < 1
    assert compare_processes(f"peak memory of {step}", (*mib, "kept"), mib) < 1.2


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "kept" in sys.argv:
        assert keep_memory()
    side, n, steps = CASES[sys.argv[1]]
    backbone = build_backbone(sys.argv[1], 3)
    network = Classifier(backbone, nn.Linear(int(backbone.width), 2)).to(memory_format=torch.channels_last)
    images = torch.rand(n, 3, side, side).contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    for step in range(steps + 3):
        if step == 3:
            start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), torch.arange(n) % 2).backward()
        optimizer.step()
    seconds = (time.perf_counter() - start) / steps
    print(1000 * seconds if sys.argv[2] == "ms" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
