"""What is said of each training image."""

import csv

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medmask.errors import Stopped
from medmask.train import per_image
from medmask.train.loader import Rows
from tests.toy import StopAfter, run_fit, settings, tiny_network, toy_data
from tests.train.test_fit import history_of

NAN = float("nan")
SIDE = Rows(np.array([7, 3, 5, 9]), np.array([0, 1, 2, 0]), np.array([0, 2, 2, 1]))  # the second and last are flipped


def memory(**columns):
    return {name: torch.tensor(values) for name, values in columns.items()}


def test_numbers_by_hand():
    found = per_image.numbers_of(
        memory(predicted=[0.0, 2, 1, 0], weight=[0.9, 0.9, 0.5, 0.1], trust=[1.0, 0.2, NAN, 0.1], label=[0.0, 2, 1, 0]),
        SIDE,
    )
    assert found == pytest.approx(
        {
            "train/flipped_as_true": 0.5,
            "train/flipped_as_given": 0.5,
            "train/flipped_mended": 0.5,
            "train/clean_kept": 0.5,
            "train/auroc_weight": (0.5 + 0 + 1 + 1) / 4,  # pairs of a flipped and a clean image, a tie counts half
            "train/auroc_trust": 1.0,
        }
    )


def test_without_flips_or_before_the_first_step_there_are_no_numbers():
    clean = Rows(SIDE.positions, SIDE.labels, SIDE.labels)
    assert per_image.numbers_of(memory(predicted=[0.0, 1, 2, 0], weight=[1.0, 1, 1, 1]), clean) == {}
    assert per_image.numbers_of(memory(predicted=[NAN] * 4, weight=[NAN] * 4), SIDE) == {}
    assert per_image.histograms_of(memory(weight=[1.0, 2, 3, NAN]), clean)["weight/clean"].tolist() == [1, 2, 3]


def test_tables(tmp_path):
    per_image.write_table(tmp_path, 5, memory(weight=[0.5, 1.5, NAN, 1.0]), SIDE)
    with per_image.table_of(tmp_path, 5).open() as file:
        assert list(csv.reader(file)) == [
            ["position", "weight", "trust"], ["7", "0.5", ""], ["3", "1.5", ""], ["5", "", ""], ["9", "1", ""],
        ]  # fmt: skip
    per_image.write_table(tmp_path, 6, memory(predicted=[0.0] * 4), SIDE)
    assert [e for e in range(1, 13) if per_image.is_recorded(e, 5, 12)] == [5, 10, 12]
    assert per_image.recorded_epochs(tmp_path, 5, 12) == [5]


def test_histograms_of_the_epochs_recorded_are_in_tensorboard(tmp_path):
    cfg = settings(method="proposal", epochs=3, record_every=2)
    _, state = run_fit(cfg, toy_data(tmp_path / "data", flip_every=3), tmp_path / "work")
    board = EventAccumulator(str(tmp_path / "work" / "tensorboard"), {"histograms": 0}).Reload()
    tags = {f"{name}/{kind}" for name in ("weight", "trust") for kind in ("clean", "flipped")}
    assert set(board.Tags()["histograms"]) == tags
    shown = {tag: board.Histograms(tag) for tag in tags}
    assert {tuple(event.step for event in events) for events in shown.values()} == {(state.step // 3 * 2, state.step)}
    assert [shown[f"weight/{kind}"][0].histogram_value.num for kind in ("clean", "flipped")] == [14, 7]


def test_a_run_writes_them_and_a_resumed_one_the_same(tmp_path):
    data = toy_data(tmp_path / "data", flip_every=3)
    cfg = settings(method="proposal", epochs=3, record_every=2)
    stale = per_image.table_of(tmp_path / "whole", 1)
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier run")
    run_fit(cfg, data, tmp_path / "whole")
    with pytest.raises(Stopped):
        run_fit(cfg, data, tmp_path / "parts", stop=StopAfter(7))  # in the last epoch
    run_fit(cfg, data, tmp_path / "parts")
    tables = [{p.name: p.read_text() for p in (tmp_path / w / per_image.FOLDER).iterdir()} for w in ("whole", "parts")]
    assert tables[0] == tables[1]
    assert set(tables[0]) == {"00002.csv", "00003.csv"}
    ends = [line for line in history_of(tmp_path / "whole") if "val/loss" in line]
    names = {f"train/{n}" for n in ("flipped_as_true", "flipped_as_given", "flipped_mended", "clean_kept",
                                    "auroc_weight", "auroc_trust")}  # fmt: skip
    assert all(names <= set(line) for line in ends)
    assert ends == [line for line in history_of(tmp_path / "parts") if "val/loss" in line]


def test_early_learning_of_a_supervised_run(tmp_path):
    data = toy_data(tmp_path / "data", flip_every=3)
    run_fit(settings(epochs=1, batch_size=21, lr=1e-9), data, tmp_path / "work")
    predicted = tiny_network().train()(data.reader.batch(data.train.positions)).argmax(1).numpy()
    flipped = data.train.labels != data.train.true_labels
    (end,) = [line for line in history_of(tmp_path / "work") if "val/loss" in line]
    as_true = float((predicted == data.train.true_labels)[flipped].mean())
    assert (end["train/flipped_as_true"], end["train/flipped_as_given"]) == pytest.approx((as_true, 1 - as_true))
