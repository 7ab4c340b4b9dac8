"""A training stops for a signal, or ahead of its time limit."""

import logging
import os
import signal
import time
from pathlib import Path

import pytest

from medmask.train.signals import STOP_AT, grace_seconds, stop_time, watch_signals

JOB = {"SLURM_JOB_ID": "7"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_sets_the_flag_and_nothing_else(number):
    before = signal.getsignal(number)
    with watch_signals({}) as flag:
        assert not flag.is_set
        os.kill(os.getpid(), number)
        assert flag.is_set
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("stop_at", "is_set"), [("0", True), ("", False), ("no number", False), ("1e99", False)])
def test_the_flag_is_set_when_the_time_is_up(stop_at, is_set):
    with watch_signals({STOP_AT: stop_at}) as flag:
        assert flag.is_set == is_set


def test_the_time_comes():
    with watch_signals({STOP_AT: str(time.time() + 0.2)}) as flag:
        assert not flag.is_set
        time.sleep(0.25)
        assert flag.is_set


def squeue(folder: Path, text: str) -> dict[str, str]:
    """Variables of job 7, and a squeue that knows of it."""
    script = f'#!/bin/sh\n[ "$2 $3 $SLURM_TIME_FORMAT" = "--jobs=7 --format=%S %e %s" ] || exit 9\n{text}\n'
    (folder / "squeue").write_text(script)
    (folder / "squeue").chmod(0o755)
    return {**JOB, "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(("seconds", "grace"), [(3600, 120), (480, 120), (479, 119), (60, 15)])
def test_a_slurm_job_stops_ahead_of_its_end(tmp_path, seconds, grace):
    """Slurm 22.05 has no variable for it."""
    assert grace_seconds(seconds / 60) == grace
    environ = squeue(tmp_path, f"echo 1000 {1000 + seconds}")
    assert stop_time(environ) == 1000 + seconds - grace
    times = {"SLURM_JOB_START_TIME": "2000", "SLURM_JOB_END_TIME": str(2000 + seconds)}
    assert stop_time({**environ, **times}) == 2000 + seconds - grace
    assert stop_time({**environ, STOP_AT: "5"}) == 5  # the launcher's word


@pytest.mark.parametrize("text", ["echo 1000 N/A", "echo 1000 NONE", "echo N/A N/A", "true"])
def test_a_slurm_job_without_a_limit(tmp_path, text):
    environ = squeue(tmp_path, text)
    assert stop_time(environ) is None


def test_a_slurm_that_does_not_answer_is_said(tmp_path, caplog):
    environ = squeue(tmp_path, "exit 1")
    with caplog.at_level(logging.WARNING):
        assert stop_time(environ) is None
    assert "this job does not stop by itself ahead of its time limit" in caplog.text
