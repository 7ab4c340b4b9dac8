"""The launcher with real processes, few of them, and its judgement with none."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medmask import cli, launch
from medmask.models.weights import read_model
from tests.toy import SETTINGS, is_same, write_data

ROOT = Path(__file__).parents[1]
OUTPUTS = {
    "model": "model.safetensors",
    "best": "best.safetensors",
    "history": "history.jsonl",
    "record": "record.json",
}
LONG = {**SETTINGS, "epochs": 40, "ranks": 2, "augment": {"flip": 0.5}, "schedule": {"kind": "cosine"}}
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def command(folder: Path, data: dict[str, Path], settings=LONG) -> list[str]:
    flags = [text for name, path in data.items() for text in (f"--{name}", str(path))]
    flags += [text for name, file in OUTPUTS.items() for text in (f"--{name}", str(folder / "out" / file))]
    return ["finetune", "--config", json.dumps(settings), "--work-dir", str(folder / "work"), *flags]


def launched(folder: Path, data: dict[str, Path], settings=LONG) -> list[str]:
    head = [sys.executable, "-m", "medmask.launch", "--ranks", "2", "--work-dir", str(folder / "work")]
    return [*head, "--", *command(folder, data, settings)]


def start(line: list[str]) -> subprocess.Popen:
    return subprocess.Popen(line, env=ENVIRON, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(is_true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """An uninterrupted run of two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(launched(folder, data))
    errors = process.communicate(timeout=200)[1]
    assert process.returncode == 0, errors
    return folder, errors


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_model(folder / "out" / "model.safetensors")[0]


@pytest.mark.slow
def test_two_ranks_end_like_one_and_show_the_log_of_the_first(whole, data, tmp_path):
    folder, errors = whole
    assert sorted(p.name for p in (folder / "out").iterdir()) == sorted([*OUTPUTS.values(), "config.json"])
    assert sorted(p.name for p in (folder / "work").iterdir()) == ["history.jsonl", "launch", "tensorboard"]
    assert "epoch 40/40 step 200/200" in errors
    assert errors.count("epoch 40/40") == 1
    assert json.loads((folder / "out" / "record.json").read_text())["ranks"] == 2
    short = {**LONG, "epochs": 1}
    assert cli.main(command(tmp_path, data, short)) == 0
    lines = [(f / "out" / "history.jsonl").read_text().splitlines()[0] for f in (folder, tmp_path)]
    first, second = (json.loads(line)["loss/total"] for line in lines)
    assert first == pytest.approx(second, rel=1e-5)


@pytest.mark.slow
def test_stopped_by_a_signal_and_started_again(whole, data, tmp_path):
    process = start(launched(tmp_path, data))
    history = tmp_path / "work" / "history.jsonl"
    wait_for(lambda: history.exists() and history.read_text().count("\n") > 20)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == cli.STOPPED, errors
    assert "told to stop: job" in errors
    assert "the same command goes on from there" in errors
    assert list((tmp_path / "work").glob("checkpoint-*.pt"))
    assert list((tmp_path / "out").iterdir()) == []
    again = start(launched(tmp_path, data))
    errors = again.communicate(timeout=200)[1]
    assert again.returncode == 0, errors
    assert is_same(weights(tmp_path), weights(whole[0]))
    assert sorted(p.name for p in (tmp_path / "work" / "launch").iterdir()) == ["001", "002"]


@pytest.mark.slow
def test_torchrun_ends_with_the_same_bits(whole, data, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "medmask"]
    process = start([*torchrun, *command(tmp_path, data)])
    errors = process.communicate(timeout=200)[1]
    assert process.returncode == 0, errors
    assert is_same(weights(tmp_path), weights(whole[0]))


@pytest.mark.slow
def test_a_mistake_that_the_ranks_find_is_one_line(data, tmp_path):
    files = write_data(tmp_path / "data")
    files["labels"].write_text(files["labels"].read_text().replace("i3,1,1", "i3,1,9"))
    process = start(launched(tmp_path, files))
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2, errors
    assert errors.count("image i3: label outside 0..1") == 1
    assert "Traceback" not in errors


def test_mistakes_are_found_before_anything_is_started(data, tmp_path, capsys):
    line = launched(tmp_path, data, {**LONG, "lr": -1})[3:]
    assert launch.main(line) == 2
    assert "lr" in capsys.readouterr().err.splitlines()[-1]
    assert launch.main(["--ranks", "2", "--work-dir", str(tmp_path), "--", "split"]) == 2
    assert "need a training stage after `--`, got 'split'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        launch.main(["--ranks", "2", "--work-dir", str(tmp_path), "--", "finetune", "--nonsense"])
    assert stop.value.code == 2
    assert not (tmp_path / "work").exists()


class FakeCluster:
    """Jobs that end at once, each leaving what `effects` does."""

    def __init__(self, folder: Path, effects: list[Callable[[Path], None]]) -> None:
        self.effects, self.folder, self.n = effects, folder, 0
        self.told: list[str] = []
        self.as_cluster = launch.Cluster(self.submit, lambda job: False, lambda job: self.told.append(job.job_id))

    def submit(self, line, options, folder):
        self.effects[self.n](folder)
        self.n += 1
        return "7"


def fake(monkeypatch, data, tmp_path, *effects, flags=()):
    cluster = FakeCluster(tmp_path, list(effects))
    monkeypatch.setitem(launch.CLUSTERS, "local", cluster.as_cluster)
    line = ["--ranks", "2", "--work-dir", str(tmp_path / "work"), *flags, "--", *command(tmp_path, data)]
    return launch.main(line), cluster


def leave(folder: Path, code: int, rank: int) -> None:
    from submitit.core.utils import cloudpickle_dump

    cloudpickle_dump(("success", code), folder / f"7_{rank}_result.pkl")


def finish(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(exist_ok=True)
    for name in OUTPUTS.values():
        (tmp_path / "out" / name).write_text("x")


def test_a_job_that_reached_its_time_limit_is_submitted_again(monkeypatch, data, tmp_path):
    code, cluster = fake(monkeypatch, data, tmp_path, lambda f: leave(f, 75, 0), lambda f: finish(tmp_path))
    assert (code, cluster.n) == (0, 2)
    assert not (tmp_path / "work" / "job.json").exists()


def test_submissions_are_bounded(monkeypatch, data, tmp_path):
    effects = [lambda f: leave(f, 75, 0)] * 3
    code, cluster = fake(monkeypatch, data, tmp_path, *effects, flags=["--max-requeues", "1"])
    assert (code, cluster.n) == (cli.STOPPED, 2)


def test_a_good_result_without_outputs_is_a_failure(monkeypatch, data, tmp_path, capsys):
    def effect(folder):
        finish(tmp_path)
        (tmp_path / "out" / "best.safetensors").unlink()
        leave(folder, 0, 0)
        (folder / "7_1_log.err").write_text("first\n" * 100 + "RuntimeError: the reason\n")

    assert fake(monkeypatch, data, tmp_path, effect)[0] == 1
    errors = capsys.readouterr().err
    assert "job 7 ended without its outputs; rank 1 last wrote:" in errors
    assert errors.endswith("  | RuntimeError: the reason\n")
    assert errors.count("first") == launch.TAIL_LINES - 1


def test_outputs_count_even_when_a_result_is_missing_but_not_old_ones(monkeypatch, data, tmp_path):
    assert fake(monkeypatch, data, tmp_path, lambda folder: finish(tmp_path))[0] == 0
    os.utime(tmp_path / "out" / "record.json", (1, 1))
    assert fake(monkeypatch, data, tmp_path, lambda folder: None)[0] == 1


def test_a_job_that_still_runs_is_followed(monkeypatch, data, tmp_path):
    job = launch.Job("local", "7", str(tmp_path), 2, launch.socket.gethostname(), submitted=0.0)
    options = launch.Options("local", 2, tmp_path, 1, 0)
    launch.io.write_json(launch.job_file(options), vars(job))
    runs = launch.Cluster(None, lambda job: True, None)
    gone = launch.Cluster(None, lambda job: False, None)
    assert launch.running_job(options, runs) == job
    assert launch.running_job(options, gone) is None
    launch.io.write_json(launch.job_file(options), {**vars(job), "host": "elsewhere"})
    with pytest.raises(launch.LaunchError, match="job 7 was started on elsewhere"):
        launch.running_job(options, runs)


def test_a_process_of_another_launcher_is_recognised(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path)]) as process:
        job = launch.Job("local", str(process.pid), str(tmp_path), 2, "here", 0.0)
        assert launch.is_running_locally(job)
        launch.stop_locally(job)
        wait_for(lambda: not launch.is_running_locally(job))
    init = launch.Job("local", "1", str(tmp_path), 2, "here", 0.0)
    assert not launch.is_running_locally(init)


def test_ranks_see_the_gpus_of_the_launcher(monkeypatch):
    seen = {}
    monkeypatch.setattr(launch.cli, "main", lambda line: seen.update(os.environ, line=line) or 0)
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    place = type("Place", (), {"global_rank": 1, "local_rank": 1, "num_tasks": 2, "num_nodes": 1, "hostnames": ["h"]})
    monkeypatch.setattr(launch.submitit, "JobEnvironment", place)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", launch.DEVICES):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv(launch.DEVICES, "GPU-a,GPU-b")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launch.run_rank(["finetune"]) == 0
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["RANK"], seen["WORLD_SIZE"]) == ("GPU-a,GPU-b", "1", "2")
    assert seen["line"] == ["finetune"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    seen.clear()
    launch.run_rank(["finetune"])
    assert "CUDA_VISIBLE_DEVICES" not in seen
