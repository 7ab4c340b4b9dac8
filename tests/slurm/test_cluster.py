"""cluster.sh itself, on a second cluster beside the one of the other tests."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.slurm.conftest import SCRIPT

pytestmark = pytest.mark.slurm


class Cluster:
    """Calls of cluster.sh on a folder and ports of its own, without accounting."""

    def __init__(self, folder: Path) -> None:
        own = {"MEDMASK_SLURM_DIR": str(folder), "MEDMASK_SLURM_PORT": "16900", "MEDMASK_SLURM_ACCOUNTING": "0"}
        self.environment = {**os.environ, **own, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, **environment: str) -> tuple[int, str]:
        env = self.environment | environment
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)
        return done.returncode, done.stdout + done.stderr

    def __call__(self, *words: str, **environment: str) -> tuple[int, str]:
        return self.run(str(SCRIPT), *words, **environment)


@pytest.fixture
def second(slurm):
    with tempfile.TemporaryDirectory(prefix="medmask-slurm-", ignore_cleanup_errors=True) as name:
        cluster = Cluster(Path(name))
        yield cluster
        cluster("down")


def test_cluster_comes_and_goes(second, slurm):
    assert second("status") == (1, f"cluster: error: not running ({second.environment['MEDMASK_SLURM_DIR']})\n")
    code, text = second("up")
    assert code == 0, text
    assert f"export SLURM_CONF={second.environment['SLURM_CONF']}" in text
    assert "runs already" in second("up")[1]
    code, text = second("up", MEDMASK_SLURM_ACCOUNTING="1")
    assert (code, "take it down first" in text) == (1, True)
    assert second.run("sacct") == (1, "Slurm accounting storage is disabled\n")
    assert second.run("srun", "--nodes=2", "--gpus-per-node=8", "--time=1", "printenv", "CUDA_VISIBLE_DEVICES") == (
        0, "0,1,2,3,4,5,6,7\n" * 2
    )  # fmt: skip
    assert second("node", "n1", "stop")[0] == 0
    code, text = second("status")
    assert (code, "n1 does not run" in text) == (1, True)
    assert second("node", "n1", "start")[0] == 0
    assert second("status")[0] == 0
    assert second("down")[0] == 0
    assert not Path(second.environment["MEDMASK_SLURM_DIR"]).exists()
    assert subprocess.run(["sinfo"], env={**os.environ, "SLURM_CONF": slurm}, check=False).returncode == 0


def test_a_folder_with_other_things_is_left_alone(second):
    folder = Path(second.environment["MEDMASK_SLURM_DIR"])
    (folder / "thesis.tex").touch()
    for word in ("up", "down"):
        code, text = second(word)
        assert (code, "holds other things" in text) == (1, True)
    assert (folder / "thesis.tex").exists()


def test_usage(second):
    assert second()[0] == second("sideways")[0] == second("node", "n9", "stop")[0] == 1
