"""Trainings of one process on a real Slurm: they stop ahead of the time limit, and wait for each other."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from medmask import cli
from medmask.config.load import load_config
from medmask.models.backbones import build_backbone
from medmask.models.weights import read_model
from medmask.runs import make_plan
from tests.slurm.demo import ROOT, Demo, slurm
from tests.toy import SETTINGS, is_same, wait_for, write_data

NAMES = {"model": ".safetensors", "best": ".safetensors", "history": ".jsonl", "record": ".json"}
LONG = {**SETTINGS, "batch_size": 16, "augment": {"flip": 0.5}, "schedule": {"kind": "cosine"}}

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("slurm"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), n=200, n_val=40)


class Training:
    """One training in a folder, and the jobs that are submitted for it."""

    def __init__(self, folder: Path, data: dict[str, Path], epochs: int) -> None:
        self.folder, self.work, self.out = folder, folder / "work", folder / "out"
        words = [sys.executable, "-m", "medmask", "finetune", "--config", json.dumps({**LONG, "epochs": epochs})]
        words += [text for name, file in data.items() for text in (f"--{name}", str(file))]
        words += [text for name, end in NAMES.items() for text in (f"--{name}", str(self.out / f"{name}{end}"))]
        self.command = shlex.join([*words, "--work-dir", str(self.work)])
        self.jobs: list[str] = []

    def submit(self, minutes: int = 5) -> str:
        """Submit a job; returns its id."""
        line = ["sbatch", "--parsable", "--account=lab", "--partition=cpu", "--mem=2000", f"--time={minutes}"]
        line += [f"--output={self.folder}/%j.log", f"--chdir={ROOT}", "--export=ALL,OMP_NUM_THREADS=1"]
        self.jobs.append(slurm(*line, "--wrap", self.command))
        return self.jobs[-1]

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def steps(self) -> list[int]:
        path = self.work / "history.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


@pytest.fixture
def training(tmp_path, data):
    """Makes a training; its jobs end with the test."""
    made = []

    def make(epochs: int) -> Training:
        made.append(Training(tmp_path, data, epochs))
        return made[-1]

    yield make
    for run in made:
        subprocess.run(["scancel", *run.jobs], check=False)


def facts(job: str) -> dict[str, str]:
    words = slurm("scontrol", "show", "job", "-o", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def wait_for_end(job: str, seconds: float = 120) -> dict[str, str]:
    wait_for(lambda: facts(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), seconds)
    return facts(job)


def test_a_training_saves_and_ends_before_its_time_limit(training):
    run = training(epochs=100_000)
    job = run.submit(minutes=1)
    ended = wait_for_end(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", f"{cli.STOPPED}:0"), run.log(job)  # and not TIMEOUT
    assert "00:00:44" <= ended["RunTime"] < "00:01:00"  # a quarter of the minute is kept for it
    assert f"saved in {run.work}; the same command goes on from there" in run.log(job)
    steps = run.steps()
    assert (run.work / f"checkpoint-{steps[-1]:09d}.pt").exists()
    run.submit(minutes=1)
    wait_for(lambda: run.steps()[-1] > steps[-1])
    assert run.steps()[: len(steps)] == steps  # gone on, not begun anew


def test_a_second_job_for_the_same_training_waits_for_the_first(training):
    """As after `kill -9` of Snakemake, whose next start submits again what still runs."""
    run = training(epochs=60)
    first = run.submit()
    wait_for(lambda: bool(run.steps()))
    second = run.submit()
    assert [wait_for_end(job)["ExitCode"] for job in (first, second)] == ["0:0", "0:0"], run.log(second)
    assert f"of job {first} on " in run.log(second)
    assert "is training here; waiting for its end" in run.log(second)
    assert "another job has finished this run in the meantime" in run.log(second)
    assert "epoch" not in run.log(second)
    assert not list(run.work.glob("*.lease"))


def test_a_second_job_goes_on_where_the_first_was_killed(training, tmp_path, data):
    run = training(epochs=60)
    first = run.submit()
    wait_for(lambda: max(run.steps(), default=0) > 100)
    second = run.submit()
    wait_for(lambda: "waiting for its end" in run.log(second))
    os.kill(json.loads((run.work / "writer.lease").read_text())["pid"], signal.SIGKILL)
    assert wait_for_end(first)["ExitCode"] != "0:0"
    assert wait_for_end(second)["ExitCode"] == "0:0", run.log(second)
    assert "another job has finished" not in run.log(second)
    (tmp_path / "whole").mkdir()
    whole = Training(tmp_path / "whole", data, epochs=60)
    subprocess.run(whole.command, shell=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    weights, expected = (read_model(one.out / "model.safetensors")[0] for one in (run, whole))
    assert is_same(weights, expected)


def test_a_training_moves_when_its_node_dies(tmp_path):
    config = yaml.safe_load((ROOT / "tests" / "fixtures" / "config_tiny.yaml").read_text())
    config["finetunings"]["plain"]["epochs"] = 250
    del config["experiments"]["tiny"]["runs"]["pretrained"]
    run = Demo(tmp_path, config)
    run.start()
    try:
        wait_for(lambda: any("epoch 20/" in log.read_text() for log in tmp_path.glob("logs/finetune/*.log")))
        lines = slurm("squeue", "--noheader", "--format=%N|%Z").splitlines()
        (node,) = [line.split("|")[0] for line in lines if line.endswith(str(tmp_path))]
        slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        run.finish()
    finally:
        run.clean_up()
    states = [state for _, _, state in run.jobs("--duplicates")]
    assert sorted(states) == ["COMPLETED"] * 5 + ["NODE_FAIL"]  # the five stages once each: nothing was submitted twice
    (history,) = tmp_path.glob("results/finetune/*/history.jsonl")
    steps = [row["step"] for row in map(json.loads, history.read_text().splitlines()) if "loss/total" in row]
    assert steps == sorted(set(steps))


def test_weights_are_loaded_where_snakemake_runs(tmp_path):
    """Nodes often have no internet."""
    torch.save(build_backbone("small_cnn", 1).state_dict(), tmp_path / "w.pt")
    loaded = {"method": "weights", "source": "file", "backbone": "small_cnn", "file": str(tmp_path / "w.pt")}
    config = yaml.safe_load((ROOT / "tests" / "fixtures" / "config_tiny.yaml").read_text())
    config["pretrainings"]["base"] = {**loaded, "image": {"size": 28, "channels": 1}}
    (key,) = make_plan(load_config(config)).artifacts["pretrain"]
    said = Demo(tmp_path, config).call("--", f"results/pretrain/{key}/record.json")
    assert "localrule weights:" in said
    assert "has been submitted" not in said
    assert json.loads((tmp_path / "results/pretrain" / key / "record.json").read_text())["sha256"]


def test_snakemake_inside_a_batch_job_submits_jobs_of_its_own(tmp_path):
    """For sites that end long processes on login nodes."""
    config = yaml.safe_load((ROOT / "tests" / "fixtures" / "config_tiny.yaml").read_text())
    demo = Demo(tmp_path / "inside", config)
    snakemake = Path(sys.executable).with_name("snakemake")
    line = ["sbatch", "--parsable", "--account=lab", "--partition=cpu", "--mem=1000", "--time=20", "--ntasks=1"]
    line += ["--cpus-per-task=1", f"--chdir={demo.folder}", f"--output={demo.folder}/said.txt"]
    outer = slurm(
        *line, "--export=ALL,OMP_NUM_THREADS=1", "--wrap", f"{snakemake} --profile slurm --configfile demo.yaml"
    )
    try:
        wait_for(
            lambda: slurm("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={outer}") == "COMPLETED", 600
        )
        assert (demo.folder / "results" / "tiny" / "report.html").exists(), demo.said()
        states = [state for _, _, state in demo.jobs()]
        assert states == ["COMPLETED"] * 7  # data, split, noise, twice finetune and evaluate
        assert demo.jobs_of_pretraining() == 1
    finally:
        subprocess.run(["scancel", outer], check=False)
        demo.clean_up()
