"""Ratios against a floor that is measured in the same run; `make bench` writes them to bench/RESULTS.md."""

import functools
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from medmask import io
from medmask.models.cores import keep_memory

ROUNDS = 15
lines: list[str] = []


@pytest.fixture
def compare():
    """Time two functions in turn, round by round, in one thread; returns the median of the ratios."""

    def run(question: str, ours, floor, unit: str) -> float:
        torch.set_num_threads(1)
        keep_memory()
        for function in (ours, floor):
            function()
        seconds = [(timed(ours), timed(floor)) for _ in range(ROUNDS)]
        base = [second for _, second in seconds]
        if max(base) > 1.5 * min(base):
            pytest.fail(f"{question}: the floor varied by {max(base) / min(base):.2f}x, the run is void")
        ratios = sorted(own / other for own, other in seconds)
        ratio = statistics.median(ratios)
        spread, middle = f"{ratios[0]:.2f} to {ratios[-1]:.2f}", statistics.median(base)
        lines.append(f"| {question} | {ratio:.2f} | {spread} | {middle:.4g} s {unit} |")
        return ratio

    return run


@pytest.fixture
def compare_processes():
    """Run two modules that print a number, each in three fresh processes; returns the ratio of the medians."""

    def run(question: str, ours: tuple[str, ...], floor: tuple[str, ...], unit: str = "MiB") -> float:
        own, base = measure(ours), measure(floor)
        ratio = own[1] / base[1]
        spread = f"{own[0] / base[2]:.2f} to {own[2] / base[0]:.2f}"
        lines.append(f"| {question} | {ratio:.2f} | {spread} | {base[1]:.4g} {unit} |")
        return ratio

    return run


@functools.cache
def measure(command: tuple[str, ...]) -> list[float]:
    runs = [subprocess.run([sys.executable, "-m", *command], capture_output=True, check=True) for _ in range(3)]
    return sorted(float(run.stdout) for run in runs)


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def pytest_sessionfinish(session, exitstatus):
    if lines:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, one thread"
        head = [
            "# Benchmarks",
            "",
            f"`make bench` at commit {io.commit()}, {machine}; medians of {ROUNDS} interleaved rounds.",
            "",
            "| question | ratio to the floor | range | floor |",
            "|---|---|---|---|",
        ]
        Path(__file__).with_name("RESULTS.md").write_text("\n".join([*head, *lines]) + "\n")
