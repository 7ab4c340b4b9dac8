"""What the executor plugin asks sbatch for, and the rules the launcher: no cluster is needed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medmask.config.load import load_config
from medmask.runs import make_plan

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "tests" / "slurm" / "profile"
CHANGED = {"latency-wait", "slurm-init-seconds-before-status-checks", "seconds-between-status-checks"}
PRIVATE = ("--job-name", "--output", "--comment", "-D")
TRAINING = {
    "method": "supervised",
    "backbone": "small_cnn",
    "image": {"size": 28},
    "epochs": 1,
    "batch_size": 64,
    "lr": 0.05,
}
CONFIG = {
    "datasets": {"digits": {"reader": "digits"}},
    "splits": {"holdout": {"kind": "stratified", "sizes": {"train": 0.2, "val": 0.1, "test": 0.2}}},
    "noises": {"sym": {"kind": "symmetric", "rate": 0.2}},
    "pretrainings": {"base": {**TRAINING, "ranks": 8, "needs": {"gpu": 1, "cpus": 4, "mem_gb": 16, "hours": 24}}},
    "finetunings": {"plain": {**TRAINING, "needs": {"gpu": 1, "cpus": 4, "mem_gb": 16, "hours": 8}}},
    "evaluations": {
        "gpu": {"metrics": ["accuracy"], "needs": {"gpu": 1, "cpus": 2, "mem_gb": 8, "hours": 0.5}},
        "cpu": {"metrics": ["accuracy"], "needs": {"gpu": 0, "cpus": 2, "mem_gb": 4, "hours": 0.5}, "draws": 300},
    },
    "experiments": {
        name: {
            "dataset": "digits",
            "split": "holdout",
            "noise": "sym",
            "evaluate": name,
            "reference": "run",
            "runs": {"run": {"pretrain": "base", "finetune": "plain"}},
        }
        for name in ("gpu", "cpu")
    },
}
FAKE = """\
#!{python}
import json, os, sys
if os.path.basename(sys.argv[0]) == "sbatch" and "--test-only" not in sys.argv:
    with open("{record}", "a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\\n")
    sys.exit("sbatch: error: recorded")
print("lab" if "sacctmgr" in sys.argv[0] else "")
"""


def snakemake(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    command += ["--profile", str(PROFILE), "--configfile", str(folder / "config.yaml"), *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=env, check=False)


def keys(stage: str) -> list[str]:
    return list(make_plan(load_config(CONFIG)).artifacts[stage])


@pytest.fixture(scope="module")
def submitted(tmp_path_factory) -> dict[str, str]:
    """Options of sbatch by rule and partition, of jobs whose inputs are there."""
    folder = tmp_path_factory.mktemp("submitted")
    record, commands = folder / "sbatch.jsonl", folder / "bin"
    commands.mkdir()
    for name in ("sbatch", "sacctmgr", "sacct", "squeue", "scontrol", "sinfo", "scancel"):
        (commands / name).write_text(FAKE.format(python=sys.executable, record=record))
        (commands / name).chmod(0o755)

    def submit(*targets: str) -> None:
        path = f"{commands}:{os.environ['PATH']}"
        done = snakemake(folder, "--retries", "0", "--", *targets, PATH=path)
        assert "sbatch: error: recorded" in done.stdout + done.stderr, done.stdout + done.stderr

    def touch(stage: str, *names: str) -> None:
        for key in keys(stage):
            (folder / "results" / stage / key).mkdir(parents=True, exist_ok=True)
            for name in names:
                (folder / "results" / stage / key / name).touch()

    touch("data", "manifest.csv", "images.npy", "index.npy", "dataset.json")
    touch("split", "split.csv", "split.json")
    touch("noise", "labels.csv")
    touch("pretrain", "model.safetensors")
    submit(*(f"results/finetune/{key}/model.safetensors" for key in keys("finetune")))
    touch("finetune", "model.safetensors", "best.safetensors", "history.jsonl", "record.json")
    submit(*(f"results/evaluate/{key}/metrics.json" for key in keys("evaluate")))
    submit(*(f"results/noise/{key}/transition.png" for key in keys("noise")))
    return dict(options(json.loads(line)) for line in record.read_text().splitlines())


def options(arguments: list[str]) -> tuple[str, str]:
    """Rule and partition, and the options that have to do with geometry and money."""
    words = [word for word in arguments if not word.startswith("--wrap")]
    rule = re.match("rule_([a-z]+)", words[words.index("--comment") + 1])[1]
    for name in PRIVATE:
        place = words.index(name)
        del words[place : place + 2]
    return f"{rule} {words[words.index('-p') + 1]}", " ".join(words)


def test_one_process_with_a_gpu(submitted):
    common = "--parsable --export=ALL -A lab -p gpu"
    assert submitted["finetune gpu"] == f"{common} -t 480 --mem 16000 --requeue --cpus-per-task=4 --gpus=1"
    assert submitted["evaluate gpu"] == f"{common} -t 30 --mem 8000 --requeue --cpus-per-task=2 --gpus=1"


def test_jobs_without_a_gpu(submitted):
    common = "--parsable --export=ALL -A lab -p cpu"
    assert submitted["evaluate cpu"] == f"{common} -t 30 --mem 4000 --requeue --ntasks=1 --cpus-per-task=2"
    assert submitted["noise cpu"] == f"{common} -t 60 --mem 4000 --requeue --ntasks=1 --cpus-per-task=1"


def test_several_ranks_are_never_given_to_the_plugin(submitted):
    assert set(submitted) == {"finetune gpu", "evaluate gpu", "evaluate cpu", "noise cpu"}


LAUNCHES = {
    "8 GPUs on one node": (
        [],
        "--cluster slurm --ranks 8 --gpus 8 --cpus-per-rank 4 --mem-mb 128000 --minutes 1440 --nodes 1 "
        "--partition gpu --account lab",
    ),
    "the GPUs that are free": (
        ["ranks=4"],
        "--cluster slurm --ranks 4 --gpus 4 --cpus-per-rank 4 --mem-mb 64000 --minutes 1440 --nodes 1 "
        "--partition gpu --account lab",
    ),
    "2 nodes of 8": (
        ["ranks=16", "nodes=2"],
        "--cluster slurm --ranks 16 --gpus 16 --cpus-per-rank 4 --mem-mb 256000 --minutes 1440 --nodes 2 "
        "--partition gpu --account lab",
    ),
    "no GPUs": (
        ["gpu=0", "slurm_partition=cpu"],
        "--cluster slurm --ranks 8 --gpus 0 --cpus-per-rank 4 --mem-mb 128000 --minutes 1440 --nodes 1 "
        "--partition cpu --account lab",
    ),
    "totals of one's own": (
        ["ranks=4", "mem_mb=100000", "cpus_per_task=7", "runtime=60"],
        "--cluster slurm --ranks 4 --gpus 4 --cpus-per-rank 7 --mem-mb 100000 --minutes 60 --nodes 1 "
        "--partition gpu --account lab",
    ),
    "on this machine": (
        ["launcher=local"],
        "--cluster local --ranks 8 --gpus 8 --cpus-per-rank 4 --mem-mb 128000 --nodes 1 --partition gpu --account lab",
    ),
}


@pytest.mark.parametrize(("changes", "flags"), LAUNCHES.values(), ids=LAUNCHES)
def test_launcher_gets_what_the_profile_and_the_settings_say(tmp_path, changes, flags):
    changed = [f"pretrain_ddp:{change}" for change in changes]
    done = snakemake(tmp_path, "-n", "-p", *(["--set-resources", *changed] if changed else []))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"medmask\.launch (.*?) --work-dir", done.stdout + done.stderr) == [flags]


def test_changed_ranks_change_no_key_and_the_launcher_waits_on_one_core(tmp_path):
    text = snakemake(tmp_path, "-n", "-p", "--set-resources", "pretrain_ddp:ranks=2").stdout
    assert re.findall(r"--model results/pretrain/(\S+)/", text) == keys("pretrain")
    job = text[text.index("rule pretrain_ddp") : text.index("medmask.launch")]
    assert "threads: " not in job  # which is how Snakemake says 1


def test_profile_of_the_tests_is_the_shipped_one_with_an_account_and_short_waits():
    shipped = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    tested = yaml.safe_load((PROFILE / "config.yaml").read_text())
    tested["default-resources"].remove("slurm_account='lab'")
    for name in set(shipped) | set(tested):
        assert shipped.get(name) == tested.get(name) or name in CHANGED, name


def test_profile_asks_for_nothing_that_loses_results():
    shipped = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    assert not {"keep-incomplete", "slurm-array-jobs"} & set(shipped)
    assert not any(str(entry).startswith("cluster=") for entry in shipped["default-resources"])
