"""Checkpoints: two kept, checked when read, no code run."""

import errno
import logging
import pickle
import subprocess
import sys

import pytest
import torch

from medmask import io
from medmask.errors import CheckpointError, LaunchError
from medmask.train.checkpoint import Checkpointer, fingerprint
from tests.toy import settings


def test_two_newest_are_kept_and_the_newest_is_loaded(tmp_path):
    checkpoints = Checkpointer(tmp_path, "k")
    assert checkpoints.load() is None
    for step in (3, 20, 100):
        checkpoints.save(step, {"value": torch.tensor(step)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-000000020.pt", "checkpoint-000000020.sha256",
        "checkpoint-000000100.pt", "checkpoint-000000100.sha256",
    ]  # fmt: skip
    assert int(checkpoints.load()["value"]) == 100
    checkpoints.clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "one byte", "no digest"])
def test_a_broken_newest_one_is_passed_over_with_a_warning_that_names_both(tmp_path, caplog, damage):
    checkpoints = Checkpointer(tmp_path, "k")
    for step in (1, 2):
        checkpoints.save(step, {"value": step, "weights": torch.ones(100)})
    newest = tmp_path / "checkpoint-000000002.pt"
    if damage == "truncated":
        newest.write_bytes(newest.read_bytes()[:100])
    elif damage == "one byte":
        content = newest.read_bytes()
        newest.write_bytes(content.replace(torch.ones(3).numpy().tobytes(), b"\0" * 12, 1))
        assert newest.read_bytes() != content
    else:
        newest.with_suffix(".sha256").unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.load()["value"] == 1
    assert "checkpoint-000000002.pt" in caplog.text
    assert "going on from" in caplog.text
    assert "checkpoint-000000001.pt" in caplog.text


def test_other_settings_are_refused(tmp_path):
    Checkpointer(tmp_path, "k").save(1, {})
    with pytest.raises(CheckpointError, match=r"checkpoint-000000001.pt: belongs to other settings .* delete"):
        Checkpointer(tmp_path, "other").load()


def test_code_is_not_run(tmp_path, caplog):
    path = tmp_path / "checkpoint-000000001.pt"
    path.write_bytes(pickle.dumps(Evil(str(tmp_path / "ran"))))
    path.with_suffix(".sha256").write_text(io.file_digest(path))
    assert Checkpointer(tmp_path, "k").load() is None
    assert "cannot be read" in caplog.text
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_failed_save_leaves_the_older_one(tmp_path):
    checkpoints = Checkpointer(tmp_path, "k")
    checkpoints.save(1, {"value": 1})
    with pytest.raises(Exception, match="pickle"):
        checkpoints.save(2, {"value": lambda: 0})
    assert checkpoints.load()["value"] == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_fingerprint_leaves_out_how_a_training_is_run(tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("a")

    def key(**changes):
        return fingerprint(settings(**changes), {"labels": labels, "init": None})

    first = key()
    assert first == key(ranks=2, workers=3, needs={"cpus": 4})
    assert first != key(lr=0.06)
    assert key(sync_bn=False) != key(sync_bn=False, ranks=2)
    labels.write_text("b")
    assert first != key()


def test_checkpoints_outlive_a_version_with_one_key_more():
    old = settings()

    class Newer(type(old)):
        sharpness: int = 3

    given = old.model_dump(mode="json", exclude_defaults=True)
    assert fingerprint(Newer(**given), {}) == fingerprint(old, {})
    assert fingerprint(Newer(**given, sharpness=4), {}) != fingerprint(old, {})


def test_a_full_disk_is_said_and_the_older_checkpoint_kept(tmp_path, monkeypatch):
    checkpoints = Checkpointer(tmp_path, "k")
    checkpoints.save(1, {"x": torch.ones(3)})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("medmask.train.checkpoint.torch.save", full)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-000000002.pt: cannot be written, \d+ MB are free .*No space"
    ):
        checkpoints.save(2, {"x": torch.ones(3)})
    assert [path.name for path in checkpoints.paths()] == ["checkpoint-000000001.pt"]
    assert len(list(tmp_path.iterdir())) == 2


def test_torch_says_when_it_cannot_write_a_whole_file(tmp_path):
    """The system's error for a file over the limit of the process, as for a full disk, in a process of its own."""
    code = (
        "import resource, signal, torch, pathlib; from medmask.train.checkpoint import Checkpointer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"Checkpointer(pathlib.Path({str(tmp_path)!r}), 'k').save(1, {{'x': torch.ones(9999)}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("medmask.errors.CheckpointError: ")
    assert list(tmp_path.iterdir()) == []


def test_who_may_not_write_leaves_nothing(tmp_path):
    def refuse():
        raise LaunchError("not ours")

    with pytest.raises(LaunchError, match="not ours"):
        Checkpointer(tmp_path, "k", refuse).save(1, {})
    assert list(tmp_path.iterdir()) == []
