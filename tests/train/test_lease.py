"""One process at a time holds a folder."""

import json
import os
import subprocess
import sys

import pytest

from medmask.errors import LaunchError, Stopped
from medmask.train import lease as module
from medmask.train.lease import Lease, writer
from medmask.train.signals import StopFlag


def lease(tmp_path, **changes) -> Lease:
    return Lease(tmp_path / "a.lease", "training", changes.pop("lost", lambda: None), **changes)


def held_by(tmp_path, **changes) -> str:
    mine = lease(tmp_path)
    (tmp_path / "a.lease").write_text(text := json.dumps({**mine.mine, **changes}))
    return text


def test_a_second_holder_is_refused_until_the_first_has_ended(tmp_path):
    with lease(tmp_path) as first:
        assert first.is_held()
        with pytest.raises(LaunchError, match=f"process {os.getpid()} on .* is training here; wait for its end"):
            lease(tmp_path).__enter__()
        assert first.is_held()
    assert list(tmp_path.iterdir()) == []
    with lease(tmp_path):
        pass


def test_a_holder_that_was_killed_is_replaced_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    held_by(tmp_path, pid=process.pid)
    with lease(tmp_path) as second:
        assert second.is_held()
    held_by(tmp_path, since="12")  # the number of another process by now
    with lease(tmp_path) as second:
        assert second.is_held()


def test_a_holder_elsewhere_lives_while_its_lease_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STALE_SECONDS", 0.2)
    monkeypatch.setattr(module, "GLANCE_SECONDS", 0.01)
    held_by(tmp_path, machine="other", host="n7", job="12")
    with lease(tmp_path) as second:
        assert second.is_held()
    text = held_by(tmp_path, machine="other", host="n7", job="12")
    beats = iter(range(100))
    monkeypatch.setattr(module.time, "sleep", lambda _: os.utime(tmp_path / "a.lease", ns=(0, next(beats))))
    with pytest.raises(LaunchError, match="of job 12 on n7 is training here"):
        lease(tmp_path).__enter__()
    assert (tmp_path / "a.lease").read_text() == text


def test_a_lease_that_was_cut_is_replaced_when_nobody_touches_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STALE_SECONDS", 0.1)
    (tmp_path / "a.lease").write_text('{"host"')
    with lease(tmp_path) as second:
        assert second.is_held()


def test_a_later_start_of_a_job_replaces_an_earlier_one(tmp_path):
    held_by(tmp_path, job="12", restart=1)
    for job, restart in (("12", 1), ("12", 0), ("13", 2)):
        with pytest.raises(LaunchError, match="job 12"):
            lease(tmp_path, job=job, restart=restart).__enter__()
    with lease(tmp_path, job="12", restart=2) as later:
        assert later.is_held()


def test_a_job_waits_for_the_end_of_another(tmp_path, monkeypatch, caplog):
    """Snakemake, killed and started anew, submits what still runs a second time."""
    held_by(tmp_path, job="12")
    sleeps = []

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 3:
            (tmp_path / "a.lease").unlink()

    monkeypatch.setattr(module.time, "sleep", sleep)
    with caplog.at_level("INFO"), lease(tmp_path, job="13", stop=StopFlag()) as second:
        assert second.is_held()
    (said,) = caplog.messages
    assert f"process {os.getpid()} of job 12 on" in said
    assert "is training here; waiting for its end" in said
    assert len(sleeps) == 3


def test_who_waits_can_be_stopped(tmp_path):
    text = held_by(tmp_path, job="12")
    with pytest.raises(Stopped, match=r"of job 12 on .* is training here; told to stop while waiting"):
        lease(tmp_path, job="13", stop=StopFlag(stop_at=module.time.time() + 0.1)).__enter__()
    assert (tmp_path / "a.lease").read_text() == text


@pytest.mark.parametrize(
    ("holder", "environ"),
    [
        ("12", {"SLURM_JOB_ID": "12"}),  # a second start in one job
        ("", {"SLURM_JOB_ID": "12"}),  # of a person at a terminal, in either order
        ("12", {}),
        ("12", {"SLURM_JOB_ID": "13", "WORLD_SIZE": "2"}),  # the launcher's, which finds its job again
    ],
)
def test_nobody_else_waits(tmp_path, holder, environ):
    (tmp_path / "writer.lease").write_text(json.dumps({**lease(tmp_path).mine, "job": holder}))
    with pytest.raises(LaunchError, match="wait for its end, or stop it"):
        writer(tmp_path, StopFlag(), environ).__enter__()


def test_who_has_lost_the_lease_is_told_and_may_not_write(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    told = module.threading.Event()
    with lease(tmp_path, lost=told.set) as first:
        first.check()
        text = held_by(tmp_path, job="99")
        assert told.wait(5)
        with pytest.raises(LaunchError, match=r"no longer ours to write in; process \d+ of job 99"):
            first.check()
    assert (tmp_path / "a.lease").read_text() == text


def test_the_writer_is_named_by_job_and_restart(tmp_path):
    mine = writer(tmp_path, StopFlag(), {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "2"}).mine
    assert (mine["job"], mine["restart"]) == ("5", 2)
    assert writer(tmp_path, StopFlag(), {}).mine["restart"] == 0
