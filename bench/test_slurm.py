"""What does a waiting launcher take, and what does a requeue cost? On the tests' cluster; nothing is compared."""

import json
import os
import statistics
import time
from pathlib import Path

import pytest

from bench.conftest import lines
from tests.slurm import demo
from tests.slurm.conftest import slurm  # noqa: F401, a fixture
from tests.slurm.demo import Demo, wait_for

RANKS = 8
PAUSE = 0.5  # seconds that each step sleeps
WATCH_SECONDS = 60
MOST_MB, MOST_CORE = 150, 0.01


def seconds_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.timeout(900)
def test_launcher_and_requeue(slurm, tmp_path):  # noqa: F811
    config = demo.demo_config()
    config["pretrainings"]["demo"]["epochs"] = 40
    run = Demo(tmp_path / "demo", config)
    run.env = {"MEDMASK_TEST_PAUSE": str(PAUSE)}
    try:
        run.start("--until", "pretrain_ddp")
        run.wait_for_step(4)
        memory, share = waiting(json.loads((run.work / "launcher.lease").read_text())["pid"])
        waits = [requeue(run, restart) for restart in (1, 2, 3)]
    finally:
        run.clean_up()
    lines.append(f"| a launcher that waits, most memory (MiB) | {memory:.0f} | | limit {MOST_MB} |")
    lines.append(f"| a launcher that waits, share of a core | {share:.4f} | | limit {MOST_CORE} |")
    spread, cores = f"{min(waits):.0f} to {max(waits):.0f}", len(os.sched_getaffinity(0))
    lines.append(
        f"| a requeue of {RANKS} ranks on {cores} cores: from the start of the first rank to its next step (s) | "
        f"{statistics.median(waits):.0f} | {spread} | |"
    )
    assert memory < MOST_MB
    assert share < MOST_CORE


def waiting(pid: int) -> tuple[float, float]:
    """Most memory of a process, MiB, and the share of a core that it takes for a while."""
    began, used = time.monotonic(), seconds_of(pid)
    time.sleep(WATCH_SECONDS)
    share = (seconds_of(pid) - used) / (time.monotonic() - began)
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024, share


def requeue(run: Demo, restart: int) -> float:
    """Seconds from the start of the requeued first rank to its next step."""
    demo.slurm("scontrol", "requeue", run.job()["job_id"])
    wait_for(lambda: run.hasten() or run.starts()[-1]["restart"] == restart)
    seen = run.work / "seen-0.txt"
    size = seen.stat().st_size
    wait_for(lambda: seen.stat().st_size > size)
    seconds = time.time() - run.starts()[-1]["time"]
    run.wait_for_step(last_step(run) + 4)
    return seconds


def last_step(run: Demo) -> int:
    return int((run.work / "seen-0.txt").read_text().splitlines()[-1].split()[0])
