"""Freed memory stays with the process, and the cores are those asked for."""

import subprocess
import sys

STEPS = """
import resource, torch
from medmask.models.cores import keep_memory
if {keep}:
    assert keep_memory()
block = lambda: torch.ones(16 * 2**20)  # 64 MiB
for _ in range(8):
    block()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(32):
    block()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    run = subprocess.run([sys.executable, "-c", STEPS.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(run.stdout)


def test_freed_memory_is_used_again_without_new_pages():
    # 32 blocks have 524,288 pages; a small allocation beside a freed block can move the next block to new pages once
    assert faults(keep=True) < faults(keep=False) / 4


def test_threads_are_the_cores_unless_the_environment_says(monkeypatch):
    import torch

    from medmask.models.cores import use_cores

    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        use_cores(3)
        assert torch.get_num_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        use_cores(5)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
