"""A training stops for a signal, or ahead of its time limit."""

import os
import signal
import time

import pytest

from medmask.train.signals import STOP_AT, watch_signals


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
