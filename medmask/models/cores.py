"""The cores that a stage computes on, and the memory that it keeps between steps."""

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
KEPT_BYTES = 256 * 2**20


def use_cores(cores: int) -> None:
    """Compute in `cores` threads, unless OMP_NUM_THREADS says how many, and keep freed memory (`keep_memory`)."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)
    keep_memory()


def keep_memory() -> bool:
    """Tell glibc to keep blocks up to 256 MiB when they are freed; False where the C library has no such setting.

    By default the activations of each step go back to the kernel, which fills new pages with zeros for the next
    one: measured in bench/test_cores.py.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        [mallopt(M_MMAP_THRESHOLD, KEPT_BYTES), mallopt(M_TRIM_THRESHOLD, 4 * KEPT_BYTES)]
    )
