"""What happens to the demo on a cluster: 8 ranks pretrain, a fault comes, and no bit of the result changes.

Steps at which faults come are drawn from a seed. Each test runs the whole workflow from the pretraining on.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from tests.slurm.demo import CLUSTER, Demo, assert_same, demo_config, slurm
from tests.toy import wait_for

STEPS = 68  # of the pretraining: 4 epochs of 17
DEFAULT_CONF = Path("/etc/slurm/slurm.conf")
PAUSE = {"MEDMASK_TEST_PAUSE": "0.15"}

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def whole(slurm, tmp_path_factory) -> Demo:
    """No fault, from an empty folder to the report."""
    run = Demo(tmp_path_factory.mktemp("whole"), demo_config())
    run.env = PAUSE
    run.call()
    return run


@pytest.fixture
def run(whole, tmp_path) -> Demo:
    run = whole.without_pretraining(tmp_path / "demo")
    run.env = dict(PAUSE)
    yield run
    run.clean_up()


@pytest.fixture
def step(request) -> int:
    """When the fault comes: after two epochs, before the last one."""
    return random.Random(request.node.name).randrange(36, 50)


def test_no_fault(whole):
    assert [start["restart"] for start in whole.starts()] == [0]
    assert len(whole.seen()) == 1078
    assert set(whole.seen().values()) == {4}
    assert whole.board() == [step for step, _ in whole.history()]
    assert whole.jobs() == [("cpu", "lab", "COMPLETED")] * 7  # data, split, noise, two finetunings and evaluations
    assert (whole.folder / "results" / "demo" / "report.html").exists()
    assert list(whole.folder.glob("logs/slurm/efficiency_report_*.csv"))
    assert "Nothing to be done" in whole.call("-n")


def test_time_limit_reached_twice(run, whole):
    run.env = {"MEDMASK_TEST_PAUSE": "1.2"}
    run.start("--set-resources", "pretrain_ddp:runtime=1")
    run.finish(seconds=1100)  # a slow machine starts 8 ranks in half of the minute that they have
    assert run.starts()[-1]["restart"] >= 2
    assert_same(run, whole, requeues=run.starts()[-1]["restart"])


def test_requeued_within_an_epoch_on_two_nodes(run, whole, step):
    run.start("--set-resources", "pretrain_ddp:nodes=2")
    slurm("scontrol", "requeue", run.wait_for_step(step))
    run.finish()
    assert run.starts()[0]["nodes"] == ["n1", "n2"]
    assert_same(run, whole, requeues=1)


def test_node_goes_down(run, whole, step):
    run.start()
    job = run.wait_for_step(step)
    node = slurm("squeue", "--noheader", f"--jobs={job}", "--format=%N")
    slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    run.finish()
    assert [start["nodes"] for start in run.starts()] == [[node], [{"n1": "n2", "n2": "n1"}[node]]]
    assert_same(run, whole, requeues=1)


def test_rank_is_killed_on_two_nodes(run, whole, step):
    run.start("--set-resources", "pretrain_ddp:nodes=2")
    run.wait_for_step(step)
    os.kill(run.rank(5)["pid"], signal.SIGKILL)
    run.finish()
    assert_same(run, whole, requeues=1)


def test_slurmd_is_killed(run, whole):
    """Slurm starts the job on the other node while the ranks of the first start still train."""
    run.env = {"MEDMASK_TEST_PAUSE": "1.2"}
    run.start()
    job = run.wait_for_step(4)
    node = slurm("squeue", "--noheader", f"--jobs={job}", "--format=%N")
    first = run.rank(0)["pid"]
    subprocess.run([CLUSTER, "node", node, "stop"], check=True)
    try:
        wait_for(lambda: run.hasten() or len(run.starts()) == 2)
        wait_for(lambda: not Path(f"/proc/{first}").exists())  # it has lost the lease
        run.finish()
    finally:
        subprocess.run([CLUSTER, "node", node, "start"], check=True)
    assert_same(run, whole, requeues=1)


def test_launcher_is_killed(run, whole, step):
    run.start()
    run.wait_for_step(step)
    os.kill(json.loads((run.work / "launcher.lease").read_text())["pid"], signal.SIGKILL)
    run.finish(code=1)
    run.call()
    assert_same(run, whole, requeues=0)


def test_snakemake_is_killed_with_all_that_it_started(run, whole, step):
    run.start()
    run.wait_for_step(step)
    run.kill()
    assert "unlock" in run.call(code=1)
    run.call("--unlock")
    run.call()
    assert_same(run, whole, requeues=0)


def test_second_snakemake_is_refused_and_ctrl_c_leaves_the_job_to_itself(run, whole, step):
    first = run.start()
    job = run.wait_for_step(step)
    assert run.start(output="second.txt").wait(60) == 1
    assert "LockException" in (run.folder / "second.txt").read_text()
    assert first.poll() is None
    run.kill(signal.SIGINT)
    said = run.finish(code=1)
    assert f"job {job} goes on; the same command follows it again" in said
    run.call()
    assert_same(run, whole, requeues=0)


def test_killed_while_a_checkpoint_is_written(run, whole):
    run.env["MEDMASK_TEST_KILL_AT"] = "34"
    run.start()
    run.finish()
    assert_same(run, whole, requeues=1)


def test_newest_checkpoint_is_damaged(run, whole, step):
    run.start()
    job = run.wait_for_step(step)
    slurm("scontrol", "requeue", job)
    wait_for(lambda: slurm("squeue", "--noheader", f"--jobs={job}", "--format=%r") == "BeginTime")
    *_, older, newest = sorted(run.work.glob("checkpoint-*.pt"))
    with newest.open("r+b") as file:
        file.truncate(newest.stat().st_size // 2)
    run.finish()
    assert f"{newest.name}: damaged, its sha256 is not that of {newest.stem}.sha256; going on from" in run.log()
    assert older.name in run.log()
    assert_same(run, whole, requeues=1)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int):
    """A file system of its own for a folder; results lie on another one then, too."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_disk_is_full(run, whole):
    with small_disk(run.folder / "work", megabytes=64):
        run.start()
        run.wait_for_step(18)
        with contextlib.suppress(OSError), (run.folder / "work" / "fill").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        said = run.finish(code=1)
        assert "cannot be written, 0 MB are free there" in said
        assert "the one before is kept, and the same command goes on from it" in said
        (run.folder / "work" / "fill").unlink()
        run.call()
        assert_same(run, whole)
        run.clean_up()


@pytest.fixture
def without_accounting(tmp_path, monkeypatch):
    """A second cluster beside the first, whose sacct says that accounting is off."""
    if not DEFAULT_CONF.is_symlink():
        pytest.skip(f"{DEFAULT_CONF} is that of a Slurm which is not the tests'")
    env = {"MEDMASK_SLURM_DIR": str(tmp_path / "slurm"), "MEDMASK_SLURM_PORT": "16900", "MEDMASK_SLURM_ACCOUNTING": "0"}
    conf = Path(env["MEDMASK_SLURM_DIR"]) / "slurm.conf"
    subprocess.run([CLUSTER, "up"], env={**os.environ, **env}, check=True, timeout=300)
    monkeypatch.setenv("SLURM_CONF", str(conf))
    usual = DEFAULT_CONF.readlink()  # the plugin's jobs read it, and nothing else does
    DEFAULT_CONF.unlink()
    DEFAULT_CONF.symlink_to(conf)
    yield
    subprocess.run([CLUSTER, "down"], env={**os.environ, **env}, check=True, timeout=60)
    DEFAULT_CONF.symlink_to(usual)


def test_accounting_is_off(whole, run, step, without_accounting):
    assert subprocess.run(["sacct"], capture_output=True, check=False).returncode == 1
    run.start()
    slurm("scontrol", "requeue", run.wait_for_step(step))
    run.finish()
    assert run.starts()[-1]["restart"] == 1
    assert_same(run, whole)
    run.clean_up()


@pytest.mark.parametrize("line", ["slurm_partition='cpu'", "gpu_partition='gpu'", "slurm_account='lab'"])
def test_wrong_place_is_refused_before_anything_runs(run, line):
    profile = run.folder / "profiles" / "slurm" / "config.yaml"
    profile.write_text(profile.read_text().replace(line, f"{line.split('=')[0]}='nowhere'"))
    said = run.call(code=1)
    assert "nowhere" in said
    assert "doctor" in said
    assert not (run.folder / "logs").exists()
