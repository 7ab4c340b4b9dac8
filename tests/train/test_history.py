"""The history has each step once, also after a resume."""

import json
import logging
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medmask.train.history import History, Progress, clock_text, is_logged


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    first = History(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step=step, epoch=1, **{"loss/total": float(step)})
    first.close()
    with first.path.open("a") as file:
        file.write('{"step": 4, "lo')  # cut by a crash
    second = History(tmp_path, 2)
    second.write(step=3, epoch=1, **{"loss/total": math.nan})
    second.write(step=4, epoch=1, **{"loss/total": 4.0})
    second.close()
    lines = [json.loads(line) for line in second.path.read_text().splitlines()]
    assert [(line["step"], line["loss/total"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, None), (4, 4.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss/total")
    assert [event.step for event in events] == [1, 2, 4]


def test_a_new_start_drops_everything(tmp_path):
    History(tmp_path, 0).write(step=1, epoch=1, loss=1.0)
    History(tmp_path, 0).close()
    assert (tmp_path / "history.jsonl").read_text() == ""


@pytest.mark.parametrize(("steps", "lines"), [(1, 1), (5, 5), (10, 10), (11, 6), (469, 10)])
def test_at_most_ten_lines_an_epoch_and_the_last_step_always(steps, lines):
    logged = [step for step in range(steps) if is_logged(step, steps)]
    assert len(logged) == lines
    assert logged[-1] == steps - 1


def test_a_log_gets_plain_lines(caplog):
    progress = Progress(epochs=2, total_steps=4, step=0, is_main=False)
    with caplog.at_level(logging.INFO):
        progress.step(1, 1, loss=0.5, speed=100.0)  # too early for a line of its own
        progress.epoch(1, 2, {"accuracy": 0.75})
    assert [r.getMessage() for r in caplog.records] == [
        "epoch 1/2 step 2/4 loss 0.5000 val accuracy 0.7500 100 images/s 0:00:00 left"
    ]
    assert clock_text(3723.4) == "1:02:03"
