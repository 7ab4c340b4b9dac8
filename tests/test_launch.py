"""The launcher with real processes, few of them, and its judgement with none."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medmask import cli, io
from medmask.errors import LaunchError
from medmask.launch import after, follow, launcher, local, queue, rank, slurm
from medmask.launch.job import Job, Options, Unreachable, make_task, note, rank_file
from medmask.models.weights import read_model
from medmask.site import Answer
from tests.toy import OUTPUTS, SETTINGS, is_same, wait_for, write_data

ROOT = Path(__file__).parents[1]
FILES = {**OUTPUTS, "weights": "weights.csv"}
LONG = {**SETTINGS, "epochs": 40, "ranks": 2, "augment": {"flip": 0.5}, "schedule": {"kind": "cosine"}}
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def command(folder: Path, data: dict[str, Path], settings=LONG) -> list[str]:
    flags = [text for name, path in data.items() for text in (f"--{name}", str(path))]
    flags += [text for name, file in FILES.items() for text in (f"--{name}", str(folder / "out" / file))]
    return ["finetune", "--config", json.dumps(settings), "--work-dir", str(folder / "work"), *flags]


def launched(folder: Path, data: dict[str, Path], settings=LONG) -> list[str]:
    head = [sys.executable, "-m", "medmask.launch", "--ranks", "2", "--work-dir", str(folder / "work")]
    return [*head, "--", *command(folder, data, settings)]


def start(line: list[str]) -> subprocess.Popen:
    return subprocess.Popen(line, env=ENVIRON, cwd=ROOT, stderr=subprocess.PIPE, text=True)


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
    assert sorted(p.name for p in (folder / "out").iterdir()) == sorted([*FILES.values(), "config.json"])
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
    errors = process.communicate(timeout=200)[1]
    assert process.returncode == cli.STOPPED, errors
    assert "told to stop: job" in errors
    assert "the same command goes on from there" in errors
    assert list((tmp_path / "work").glob("checkpoint-*.pt"))
    assert not (tmp_path / "out").exists()
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
    errors = process.communicate(timeout=200)[1]
    assert process.returncode == 2, errors
    assert errors.count("image i3: label outside 0..1") == 1
    assert "Traceback" not in errors


def test_mistakes_are_found_before_anything_is_started(data, tmp_path, capsys):
    line = launched(tmp_path, data, {**LONG, "lr": -1})[3:]
    assert launcher.main(line) == 2
    assert "lr" in capsys.readouterr().err.splitlines()[-1]
    assert launcher.main(["--ranks", "2", "--work-dir", str(tmp_path), "--", "split"]) == 2
    assert "need a training stage after `--`, got 'split'" in capsys.readouterr().err
    assert launcher.main(launched(tmp_path, {**data, "split": tmp_path / "no.csv"})[3:]) == 2
    assert "--split: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        launcher.main(["--ranks", "2", "--work-dir", str(tmp_path), "--", "finetune", "--nonsense"])
    assert stop.value.code == 2
    for flags in (["--ranks", "0"], ["--ranks", "2", "--minutes", "0"], ["--ranks", "2", "--gpus", "-1"]):
        with pytest.raises(SystemExit):
            launcher.parse([*flags, "--work-dir", "w", "--", "finetune"])
    assert not (tmp_path / "work").exists()


def test_the_launcher_loads_no_torch():
    names = "medmask.launch.launcher, medmask.launch.after, medmask.stages.pretrain"
    code = f"import {names}, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_name_of_a_run_is_that_of_what_it_computes(data, tmp_path):
    def name(folder: Path, **changes) -> str:
        options = Options("local", 2, folder / "work")
        return make_task(options, command(folder, data, {**LONG, **changes})).name

    first = name(tmp_path)
    assert first == name(tmp_path, workers=1, needs={"cpus": 4, "gpu": 0}, ranks=4)
    assert len({first, name(tmp_path, lr=0.1), name(tmp_path / "other")}) == 3
    data["labels"].write_text(data["labels"].read_text() + "\n")
    assert name(tmp_path) != first


class FakeCluster:
    """Jobs that end at once, each leaving what `effects` does."""

    LIVE = frozenset({"RUNNING"})

    def __init__(self, effects: list[Callable[[Path], None]], states: list[str]) -> None:
        self.effects, self.states, self.n = effects, states, 0
        self.named: list[str] = []

    def submit(self, task, options, folder):
        self.effects[self.n](task, folder)
        self.n += 1
        return "7"

    def state(self, job):
        return self.states[min(self.n - 1, len(self.states) - 1)]

    def find(self, name):
        return self.named

    def stop(self, job): ...
    def kill(self, job): ...


@pytest.fixture
def fake(monkeypatch, data, tmp_path):
    def launch(*effects, states=("ENDED",), flags=(), named=()):
        cluster = FakeCluster(list(effects), list(states))
        cluster.named = list(named)
        monkeypatch.setitem(launcher.CLUSTERS, "local", lambda: cluster)
        line = ["--ranks", "2", "--work-dir", str(tmp_path / "work"), *flags, "--", *command(tmp_path, data)]
        return launcher.main(line), cluster

    return launch


def leave(code: int, number: int = 0) -> Callable:
    return lambda task, folder: io.write_json(rank_file(folder, number), {"pid": 1, "restart": 0, "code": code})


def finish(task, folder: Path) -> None:
    task.finished.parent.mkdir(parents=True)
    for path, _ in task.outputs:
        path.write_text("x")
    (task.finished.parent / "config.json").write_text("{}")


def test_a_job_that_reached_its_time_limit_is_submitted_again(fake, tmp_path):
    code, cluster = fake(leave(75), finish)
    assert (code, cluster.n) == (0, 2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*FILES.values(), "config.json"])
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["launch"]
    assert len(list((tmp_path / "work" / "launch").glob("*/done"))) == 2


def test_submissions_are_bounded(fake):
    code, cluster = fake(*[leave(75)] * 3, flags=["--max-requeues", "1"])
    assert (code, cluster.n) == (cli.STOPPED, 2)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ("PREEMPTED", "was preempted by another job and not put back in the queue"),
        ("NODE_FAIL", "ended because a node failed"),
        ("BOOT_FAIL", "ended because a node did not start"),
        ("TIMEOUT", "reached its time limit of 9 minutes before it could save and requeue"),
    ],
)
def test_what_a_cluster_ends_is_submitted_again(fake, capfd, state, sentence):
    code, cluster = fake(lambda *_: None, finish, states=[state], flags=["--minutes", "9"])
    assert (code, cluster.n) == (0, 2)
    said = capfd.readouterr().err
    assert f"job 7 {sentence}" in said
    assert "launch/001/7_0_log.err; " in said
    assert "the same command starts it again" in said


@pytest.mark.parametrize(
    ("state", "code", "sentence"),
    [
        ("CANCELLED", 75, "was cancelled; log: "),
        ("OUT_OF_MEMORY", 1, "needed more memory than the 500 MB asked for; log: "),
        ("DEADLINE", 1, "could not end before the deadline"),
        ("FAILED", 1, "failed; log: "),
        ("ODD", 1, "ended in the state ODD; log: "),
    ],
)
def test_what_needs_a_person_ends_in_a_sentence(fake, tmp_path, capfd, state, code, sentence):

    def save(task, folder):
        (tmp_path / "work" / "checkpoint-000000012.pt").touch()

    assert fake(save, states=[state], flags=["--mem-mb", "500"])[0] == code
    said = capfd.readouterr().err
    assert f"job 7 {sentence}" in said
    assert "the same command goes on from step 12" in said


def test_a_good_result_without_outputs_is_a_failure(fake, capsys):
    def effect(task, folder):
        finish(task, folder)
        task.outputs[1][0].unlink()
        leave(0)(task, folder)
        leave(1, number=1)(task, folder)
        (folder / "7_1_log.err").write_text("first\n" * 100 + "RuntimeError: the reason\n")

    assert fake(effect)[0] == 1
    errors = capsys.readouterr().err
    assert "job 7 ended without its outputs; log: " in errors
    assert "rank 1 last wrote:\n" in errors
    assert errors.endswith("  | RuntimeError: the reason\n")
    assert errors.count("first") == follow.TAIL_LINES - 1


def test_a_run_that_has_finished_needs_no_job(fake, data, tmp_path):
    options = Options("local", 2, tmp_path / "work")
    finish(make_task(options, command(tmp_path, data)), tmp_path)
    code, cluster = fake()
    assert (code, cluster.n) == (0, 0)
    assert (tmp_path / "out" / "record.json").read_text() == "x"


def job(folder: Path, **changes) -> Job:
    values = {"cluster": "local", "name": "medmask-1", "job_id": "7", "folder": str(folder), "ranks": 2}
    return Job(**{**values, "host": launcher.socket.gethostname(), "submitted": 0.0, **changes})


def test_a_job_that_still_runs_is_followed(data, tmp_path, monkeypatch):
    options = Options("local", 2, tmp_path / "work")
    task = make_task(options, command(tmp_path, data))
    live, gone = FakeCluster([], ["RUNNING"]), FakeCluster([], ["ENDED"])
    mine = job(tmp_path, name=task.name)
    io.write_json(launcher.job_file(options), vars(mine))
    assert launcher.find(options, live, task) == (mine, False)
    assert launcher.find(options, gone, task) == (None, True)
    for changes, message in (
        ({"host": "elsewhere"}, "job 7 was started on elsewhere"),
        ({"cluster": "slurm"}, "was started with --cluster slurm"),
        ({"name": "medmask-other"}, "job 7 trains here with other settings"),
    ):
        io.write_json(launcher.job_file(options), {**vars(mine), **changes})
        with pytest.raises(LaunchError, match=message):
            launcher.find(options, live, task)


def test_a_job_whose_launcher_died_is_found_by_its_name(data, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "SETTLE_SECONDS", 0)
    options = Options("slurm", 2, tmp_path / "work")
    task = make_task(options, command(tmp_path, data))
    io.write_json(launcher.job_file(options), vars(job(tmp_path, cluster="slurm", name=task.name, job_id=None)))
    cluster = FakeCluster([], ["RUNNING"])
    assert launcher.find(options, cluster, task) == (None, True)
    cluster.named = ["41"]
    found, is_new = launcher.find(options, cluster, task)
    assert (found.job_id, found.folder, is_new) == ("41", str(tmp_path), False)
    assert io.read_json(launcher.job_file(options))["job_id"] == "41"


@pytest.mark.slow
def test_a_second_launcher_is_refused_and_a_killed_one_replaced(whole, data, tmp_path):
    first = start(launched(tmp_path, data))
    history = tmp_path / "work" / "history.jsonl"
    wait_for(lambda: history.exists() and history.read_text().count("\n") > 5)
    second = start(launched(tmp_path, data))
    errors = second.communicate(timeout=200)[1]
    assert second.returncode == 2
    assert f"process {first.pid} on " in errors
    assert errors.endswith("is waiting for the job here; wait for its end, or stop it\n")
    first.kill()
    first.wait()
    third = start(launched(tmp_path, data))
    errors = third.communicate(timeout=200)[1]
    assert third.returncode == 0, errors
    assert "which is RUNNING" in errors
    assert is_same(weights(tmp_path), weights(whole[0]))
    assert [p.name for p in (tmp_path / "work" / "launch").iterdir()] == ["001"]


@pytest.mark.slow
def test_a_local_job_can_be_left_to_itself(whole, data, tmp_path):
    line = launched(tmp_path, data)
    process = start([*line[:3], "--on-exit", "detach", *line[3:]])
    history = tmp_path / "work" / "history.jsonl"
    wait_for(lambda: history.exists() and history.read_text().count("\n") > 5)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=200)[1]
    assert process.returncode == cli.STOPPED
    assert "goes on; the same command follows it again" in errors
    wait_for(lambda: bool(list((tmp_path / "work").glob("finished-*/record.json"))))
    again = start(line)
    assert "a job had finished this run" in again.communicate(timeout=200)[1]
    assert is_same(weights(tmp_path), weights(whole[0]))


def test_a_process_of_another_launcher_is_recognised(tmp_path):
    cluster = local.Local()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path)]) as process:
        mine = job(tmp_path, job_id=str(process.pid))
        assert cluster.state(mine) == "RUNNING"
        cluster.stop(mine)
        wait_for(lambda: cluster.state(mine) == "ENDED")
    assert cluster.state(job(tmp_path, job_id="1")) == "ENDED"


def test_ranks_that_wait_for_one_that_failed_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "FAILED_SECONDS", -1)
    cluster = local.Local()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path)]) as process:
        mine = job(tmp_path, job_id=str(process.pid))
        io.write_json(rank_file(tmp_path, 1), {"pid": process.pid, "code": None})
        io.write_json(rank_file(tmp_path, 0), {"pid": 1, "code": cli.STOPPED})
        assert cluster.state(mine) == "RUNNING"
        assert process.poll() is None
        io.write_json(rank_file(tmp_path, 0), {"pid": 1, "code": 2})
        cluster.state(mine)
        wait_for(lambda: cluster.state(mine) == "ENDED")


PLACE = {
    "global_rank": 1,
    "local_rank": 1,
    "num_tasks": 4,
    "num_nodes": 2,
    "hostnames": ["n1", "n2"],
    "raw_job_id": "9",
}
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", rank.DEVICES)


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """What the stage of a rank sees, after a call with the kind of cluster and the code that the stage ends with."""

    def run(cluster: str, code: int = 0, **changes) -> dict:
        values = {}
        monkeypatch.setattr(rank.cli, "main", lambda line: values.update(os.environ, line=line) or code)
        monkeypatch.setattr(rank.signal, "signal", lambda *_: None)
        monkeypatch.setattr(
            rank.submitit, "JobEnvironment", type("Place", (), {**PLACE, "cluster": cluster, **changes})
        )
        try:
            values["code"] = rank.run_rank(["finetune"], str(tmp_path / "finished"))
        except SystemExit as end:
            values["code"] = end.code
        return values

    for name in NAMES:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    return run


def test_ranks_see_the_gpus_of_the_launcher(seen, monkeypatch):
    monkeypatch.setenv(rank.DEVICES, "GPU-a,GPU-b")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    values = seen("local")
    assert (values["CUDA_VISIBLE_DEVICES"], values["RANK"], values["WORLD_SIZE"]) == ("GPU-a,GPU-b", "1", "4")
    assert values["line"] == ["finetune"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" not in seen("local")


def test_ranks_on_slurm_meet_on_the_first_node(seen, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    values = seen("slurm")
    assert [values[name] for name in NAMES[:6]] == ["1", "1", "4", "2", "n1", "12288"]
    assert values["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert values["code"] == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert seen("slurm")["MASTER_PORT"] == "12290"
    assert not (tmp_path / "attempts.jsonl").exists()
    seen("slurm", global_rank=0)
    line = json.loads((tmp_path / "attempts.jsonl").read_text())
    assert (line["event"], line["restart"], line["nodes"]) == ("start", 2, ["n1", "n2"])


def test_only_the_first_rank_says_that_all_have_stopped(seen, tmp_path):
    assert seen("slurm", code=75)["code"] == 0
    assert seen("slurm", code=75, global_rank=0)["code"] == 75
    assert seen("slurm", code=2)["code"] == 2
    assert io.read_json(rank_file(tmp_path, 0))["code"] == 75


@pytest.mark.parametrize("name", ["finished", "done"])
def test_a_job_requeued_after_its_end_does_nothing(seen, tmp_path, name):
    (tmp_path / name).touch()
    values = seen("slurm")
    assert values["code"] == 0
    assert "line" not in values


def test_ports_are_unlike_and_below_those_of_outgoing_connections():
    ports = {rank.port_of(job_id, restart) for job_id in range(100, 500) for restart in range(10)}
    assert len(ports) == 4000
    assert min(ports) >= 12000
    assert max(ports) < 32768


@pytest.mark.parametrize(
    ("code", "restart", "steps", "reason"),
    [
        (0, 0, [], "done"),
        (75, 0, [], ""),
        (75, 5, [], "requeued 5 times, the most that --max-requeues allows"),
        (137, 1, [], ""),
        (76, 1, [4, 9], ""),
        (137, 2, [9, 9], "ended 3 times without a new checkpoint in between"),
        (75, 2, [9, 9], ""),
        (1, 0, [], "failed"),
        (2, 0, [], "failed"),
    ],
)
def test_which_ends_of_a_job_requeue_it(tmp_path, code, restart, steps, reason):
    for step in steps:
        note(tmp_path, event="end", restart=0, code=137, step=step)
    assert after.reason_to_end(code, tmp_path, restart, step=9, max_requeues=5) == reason
    (tmp_path / "cancelled").touch()
    assert after.reason_to_end(75, tmp_path, 0, step=9, max_requeues=5) == "told to stop"


def test_ranks_that_slurm_ended_after_the_first_had_saved_are_no_crash(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    calls = []
    monkeypatch.setattr(after, "is_not_ours", lambda *_: "")
    monkeypatch.setattr(after, "requeue", calls.append)
    line = ["--code", "143", "--folder", str(tmp_path), "--work-dir", str(tmp_path), "--max-requeues", "5"]
    for restart, code in ((1, 75), (0, 143)):
        io.write_json(rank_file(tmp_path, 0), {"pid": 1, "restart": restart, "code": 75})
        assert after.main(line) == 0
        assert job(tmp_path).attempts()[-1]["code"] == code
    assert calls == ["7", "7"]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("JobId=7 JobState=RUNNING Restarts=1 Requeue=1", ""),
        ("JobId=7 JobState=CANCELLED Restarts=1", "Slurm says CANCELLED"),
        ("JobId=7 JobState=RUNNING Restarts=2", "started anew, 2 times"),
        ("", ""),
    ],
)
def test_a_job_that_slurm_ended_or_started_anew_is_not_requeued(monkeypatch, said, reason):
    done = subprocess.CompletedProcess([], 0, stdout=said)
    monkeypatch.setattr(after.subprocess, "run", lambda *_, **__: done)
    assert after.is_not_ours("7", 1) == reason


def answers(monkeypatch, sacct, squeue) -> None:
    table = {"sacct": sacct, "squeue": squeue}
    silent = Answer(False, "Unable to contact slurm controller")
    forgotten = Answer(False, "slurm_load_jobs error: Invalid job id specified")
    special = {None: silent, "": forgotten}

    def call(*line: str) -> Answer:
        text = table[line[0]]
        return special.get(text, Answer(True, text or ""))

    monkeypatch.setattr(queue, "call", call)


@pytest.mark.parametrize(
    ("sacct", "squeue", "state"),
    [
        ("RUNNING", None, "RUNNING"),
        ("CANCELLED by 1000", "", "CANCELLED"),
        ("OUT_OF_MEMORY", "", "OUT_OF_MEMORY"),
        ("FAILED", "PENDING", "PENDING"),  # a requeue is on its way
        ("COMPLETED", "COMPLETED", "COMPLETED"),
        (None, "RUNNING", "RUNNING"),  # accounting is off
        (None, "TIMEOUT", "TIMEOUT"),
        ("REQUEUED\nPENDING", None, "PENDING"),
        ("FAILED", None, "PENDING"),  # unsure: not ended before the controller agrees
    ],
)
def test_states_of_a_job(monkeypatch, sacct, squeue, state):
    answers(monkeypatch, sacct, squeue)
    assert queue.Queue().state("7") == state


def test_a_job_that_nobody_knows_is_gone_after_a_while(monkeypatch):
    asked = queue.Queue()
    answers(monkeypatch, "RUNNING", "RUNNING")
    assert asked.state("7") == "RUNNING"
    answers(monkeypatch, None, "")
    assert [asked.state("7") for _ in range(queue.MOST_GONE)] == ["RUNNING"] * (queue.MOST_GONE - 1) + ["GONE"]


def test_accounting_that_lags_behind_for_ever_is_checked(monkeypatch):
    asked = queue.Queue()
    answers(monkeypatch, "RUNNING", "COMPLETED")
    states = [asked.state("7") for _ in range(queue.CROSS_CHECK)]
    assert states == ["RUNNING"] * (queue.CROSS_CHECK - 1) + ["COMPLETED"]


def test_a_silent_slurm_is_waited_for_but_not_for_ever(monkeypatch, caplog):
    caplog.set_level("INFO")
    asked = queue.Queue()
    answers(monkeypatch, None, None)
    assert asked.state("7") == asked.state("7") == "PENDING"
    assert caplog.text.count("Slurm does not answer: Unable to contact slurm controller") == 1
    answers(monkeypatch, "RUNNING", None)
    assert asked.state("7") == "RUNNING"
    assert "Slurm answers again" in caplog.text
    answers(monkeypatch, None, None)
    asked.state("7")
    monkeypatch.setattr(queue, "SILENT_SECONDS", -1)
    with pytest.raises(Unreachable, match="the job may go on"):
        asked.state("7")


def programs(folder: Path, monkeypatch, **scripts: str) -> None:
    """Programs of Slurm's names, first in the path."""
    for name, text in {"srun": "", **scripts}.items():
        (folder / name).write_text(f"#!/bin/bash\ncd {folder}\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "PAUSE_SECONDS", 0)


def submitted(data, folder: Path) -> str:
    options = Options("slurm", 2, folder / "work", minutes=5, partition="none")
    return slurm.Slurm().submit(make_task(options, command(folder, data)), options, folder / "job")


def test_sbatch_sees_nothing_of_a_job_around_it(data, tmp_path, monkeypatch):
    programs(tmp_path, monkeypatch, sbatch="env > seen; echo Submitted batch job 41")
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    monkeypatch.setenv("SLURM_CONF", "/there")
    assert submitted(data, tmp_path) == "41"
    names = [line.split("=")[0] for line in (tmp_path / "seen").read_text().splitlines()]
    assert [name for name in names if name.startswith(("SLURM", "SBATCH"))] == ["SLURM_CONF"]
    assert os.environ["SLURM_JOB_ID"] == "3"
    assert (tmp_path / "job" / "41_submitted.pkl").exists()


def test_a_refusal_of_sbatch_is_one_line(data, tmp_path, monkeypatch, capfd):
    refusal = "echo 'sbatch: error: invalid partition specified: none' >&2; exit 1"
    programs(tmp_path, monkeypatch, sbatch=f"echo x >> calls; {refusal}")
    message = r"^sbatch: invalid partition specified: none; asked with --partition none, --account \(not given\)"
    with pytest.raises(LaunchError, match=message):
        submitted(data, tmp_path)
    assert (tmp_path / "calls").read_text() == "x\n"
    assert capfd.readouterr().err == ""


def test_a_controller_that_does_not_answer_is_asked_again(data, tmp_path, monkeypatch, caplog):
    silent = "echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller' >&2; exit 1"
    programs(
        tmp_path,
        monkeypatch,
        squeue="",
        sbatch=f"[ -e seen ] && echo Submitted batch job 42 || {{ touch seen; {silent}; }}",
    )
    assert submitted(data, tmp_path) == "42"
    assert "Unable to contact slurm controller; trying again" in caplog.text
    assert len(list((tmp_path / "job").glob("*.pkl"))) == 1
    monkeypatch.setattr(slurm, "SUBMIT_SECONDS", -1)
    programs(tmp_path, monkeypatch, sbatch=silent)
    with pytest.raises(Unreachable, match="tried for"):
        submitted(data, tmp_path)


def test_a_job_that_was_taken_without_an_answer_is_not_submitted_twice(data, tmp_path, monkeypatch):
    lost = "echo x >> calls; echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1"
    programs(tmp_path, monkeypatch, sbatch=lost, squeue="echo 43")
    assert submitted(data, tmp_path) == "43"
    assert (tmp_path / "calls").read_text() == "x\n"


def test_progress_is_shown_no_more_often_than_every_few_seconds(tmp_path, capsys):
    mine = job(tmp_path)
    lines = [f"12:00:00 INFO epoch 1/2 step {n}/20 loss 0.1 9 images/s 0:00:09 left\n" for n in range(1, 11)]
    view = follow.LogView(mine, is_new=True)
    mine.log_of(0).write_text("".join(lines[:4]))
    view.show()
    mine.log_of(0).write_text("".join(lines) + "WARNING passed over\nnot whole")
    view.show()
    view.show()
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(" loss")[0][-5:] for line in shown[:2]] == [" 4/20", "10/20"]
    assert shown[2:] == ["WARNING passed over"]
    note(tmp_path, event="start", restart=2)
    mine.log_of(0).write_text("".join(lines) + "WARNING passed over\n" + lines[0])
    view.show()
    assert capsys.readouterr().err == ""
    view.show(is_last=True)
    assert capsys.readouterr().err.endswith("left, requeued 2 times\n")
    follow.LogView(mine, is_new=False).show(is_last=True)
    assert capsys.readouterr().err == ""
