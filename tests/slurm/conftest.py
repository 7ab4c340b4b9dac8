"""The cluster of cluster.sh, brought up when a test first asks for it and left up: another run then starts at once."""

import os
import subprocess
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.slurm.demo")
SCRIPT = Path(__file__).with_name("cluster.sh")
CANNOT = 3  # exit code of cluster.sh where a machine cannot have a cluster


@pytest.fixture(scope="session")
def slurm():
    """SLURM_CONF of a real Slurm that answers; without one the test is skipped."""
    done = subprocess.run([SCRIPT, "up"], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == CANNOT:
        pytest.skip(f"no Slurm here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    conf = done.stdout.rpartition("SLURM_CONF=")[2].strip()
    os.environ["SLURM_CONF"] = conf
    return conf
