"""What do a dry run of a large grid, and a job before its work, cost above Snakemake's and Python's own?

Dry runs are counted in CPU seconds, so that other work on the machine matters less: they use one thread and wait for
nothing.
"""

import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bench.conftest import lines

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "fixtures" / "config_tiny.yaml"
SEEDS = 10
PLAIN = """
SEEDS, RATES = range(10), range(int(config["runs"]) // 10)
DATA, SPLIT, NOISE = "results/data/digits", "results/split/holdout", "results/noise/sym_s{seed}"
NETWORK, RESULT = "results/finetune/lr{rate}_s{seed}", "results/evaluate/lr{rate}_s{seed}"
METRICS = expand(RESULT + "/metrics.json", rate=RATES, seed=SEEDS)
TABLES = expand("results/grid/{name}", name=["summary.csv", *(f"table{i}" for i in range(14))])

rule all:
    input: TABLES[0], "results/runs/grid/runs.json", METRICS
rule data:
    output: expand(DATA + "/{name}", name=["manifest.csv", "images.npy", "index.npy", "dataset.json"])
    log: "logs/data.log"
    threads: 4
    resources: gpu=0, mem_mb=8000, runtime=360, ranks=1
    params: config="{}", data_root="data"
    shell: "true {params.config:q} {output} {log}"
rule split:
    input: manifest=DATA + "/manifest.csv", dataset=DATA + "/dataset.json"
    output: split=SPLIT + "/split.csv", summary=SPLIT + "/split.json"
    log: "logs/split.log"
    resources: gpu=0, mem_mb=4000, runtime=60, ranks=1
    params: config="{}"
    shell: "true {params.config:q} {input} {output} {log}"
rule noise:
    input: split=SPLIT + "/split.csv", summary=SPLIT + "/split.json"
    output: labels=NOISE + "/labels.csv", transition=NOISE + "/transition.json", figure=NOISE + "/transition.png"
    log: "logs/noise/{seed}.log"
    resources: gpu=0, mem_mb=4000, runtime=60, ranks=1
    params: config="{}"
    shell: "true {params.config:q} {input} {output} {log}"
rule finetune:
    input:
        images=DATA + "/images.npy", index=DATA + "/index.npy", split=SPLIT + "/split.csv",
        summary=SPLIT + "/split.json", labels=NOISE + "/labels.csv",
    output:
        model=NETWORK + "/model.safetensors", best=NETWORK + "/best.safetensors",
        history=NETWORK + "/history.jsonl", record=NETWORK + "/record.json",
    log: "logs/finetune/lr{rate}_s{seed}.log"
    threads: 1
    resources: gpu=0, mem_mb=1000, runtime=6, ranks=1
    params: config="{}", files="--images", work="work/lr{rate}_s{seed}"
    shell: "true {params.config:q} {params.files} {params.work} {input} {output} {log}"
rule evaluate:
    input:
        images=DATA + "/images.npy", index=DATA + "/index.npy", split=SPLIT + "/split.csv",
        summary=SPLIT + "/split.json", model=NETWORK + "/model.safetensors", best=NETWORK + "/best.safetensors",
    output:
        predictions=RESULT + "/predictions.csv", best=RESULT + "/predictions_best.csv",
        metrics=RESULT + "/metrics.json",
    log: "logs/evaluate/lr{rate}_s{seed}.log"
    threads: 1
    resources: gpu=0, mem_mb=1000, runtime=6, ranks=1
    params: config="{}"
    shell: "true {params.config:q} {input} {output} {log}"
rule runs:
    output: "results/runs/grid/runs.json"
    log: "logs/runs.log"
    params: config="{}"
    shell: "true {params.config:q} {output} {log}"
rule aggregate:
    input: runs="results/runs/grid/runs.json", evaluations=METRICS
    output: TABLES
    log: "logs/aggregate.log"
    params: arguments="{}"
    shell: "true {params.arguments:q} {output} {log}"
"""
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
"""
SNAKEMAKE = (sys.executable, "-m", "snakemake", "--profile", "profiles/local")
DRY_RUN = (*SNAKEMAKE, "-n", "--quiet")


@pytest.fixture
def folders(tmp_path):
    """Two folders to run snakemake in: with this workflow, and with the plain one."""
    ours, plain = tmp_path / "ours", tmp_path / "plain"
    for folder, names in ((ours, ("Snakefile", "workflow", "profiles")), (plain, ("profiles",))):
        folder.mkdir()
        for name in names:
            (folder / name).symlink_to(ROOT / name)
    (plain / "Snakefile").write_text(PLAIN)
    return ours, plain


def grid(runs):
    """A config of that many runs: rates x seeds, one finetuning and one evaluation each."""
    raw = yaml.safe_load(TINY.read_text())
    rates = [round(0.00001 * (i + 1), 6) for i in range(runs // SEEDS)]
    row = {"finetune": "plain", "set": {"finetune.lr": rates}}
    raw["experiments"] = {
        "grid": {
            "dataset": "digits", "split": "holdout", "noise": "sym", "seeds": list(range(SEEDS)), "runs": {"row": row},
        }
    }  # fmt: skip
    return raw


def measure(command, folder):
    """CPU seconds and peak MiB of a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, command)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seconds, memory = map(float, done.stdout.split())
    return seconds, memory


def jobs(arguments, folder):
    done = subprocess.run([*SNAKEMAKE, "-n", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return int(re.search(r"^total +(\d+)$", done.stdout + done.stderr, re.MULTILINE)[1])


def report(question, own, base, unit):
    """Write a line from the numbers of rounds; returns the median of the ratios."""
    ratios = sorted(a / b for a, b in zip(own, base, strict=True))
    middle, floor = statistics.median(own), statistics.median(base)
    ratio = statistics.median(ratios)
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)} rounds" if len(ratios) > 1 else "1 round"
    lines.append(f"| {question}: {middle:.3g} {unit} | {ratio:.2f} | {spread} | {floor:.3g} {unit} |")
    return ratio


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("runs", "rounds"), [(1000, 5), (10000, 1)])
def test_dry_run(folders, runs, rounds):
    """`snakemake -n` of a grid above that of a plain workflow of as many jobs and files, and `medmask plan` of it."""
    ours, plain = folders
    (ours / "grid.yaml").write_text(yaml.safe_dump(grid(runs)))
    own, base = ("--configfile", "grid.yaml"), ("--config", f"runs={runs}")
    if runs == 1000:
        assert jobs(own, ours) == jobs(base, plain) == 2 * runs + SEEDS + 5
    plan = (sys.executable, "-m", "medmask", "plan", *own)
    done = [
        (measure((*DRY_RUN, *own), ours), measure((*DRY_RUN, *base), plain), measure(plan, ours)) for _ in range(rounds)
    ]
    (seconds, memory), (floor, floor_memory), (planned, _) = (
        zip(*results, strict=True) for results in zip(*done, strict=True)
    )
    what = f"a grid of {runs:,} runs"
    ratio = report(f"dry run of {what} above a plain workflow of as many jobs", seconds, floor, "CPU s")
    report(f"memory of the dry run of {what} above the plain one's", memory, floor_memory, "MiB")
    assert report(f"`medmask plan` of {what} above the plain dry run", planned, floor, "CPU s") < 1
    assert ratio < 1.3


def imported(arguments, folder):
    """Seconds that a Python process spends in imports, those inside functions too."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return sum(map(int, re.findall(r"^import time: +(\d+) \|", done.stderr, re.MULTILINE))) / 1e6


@pytest.mark.timeout(1800)
def test_fixed_cost_of_a_job(folders):
    """Imports of each stage on the tiny config, above those of torch; parsing the workflow above parsing one rule."""
    ours, plain = folders
    raw = yaml.safe_load(TINY.read_text())
    raw["pretrainings"]["base"]["ranks"] = 1
    (ours / "tiny.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    command = [*SNAKEMAKE, "--cores", "1", "--configfile", "tiny.yaml", "--printshellcmds"]
    done = subprocess.run(command, cwd=ours, capture_output=True, text=True, check=True)
    stages = {}
    for line in re.findall(r"^Shell command: python (-m medmask .*) 2>&1", done.stdout + done.stderr, re.MULTILINE):
        words = shlex.split(line)
        stages.setdefault(words[2], words)
    rounds = range(3)
    for stage, words in stages.items():
        pairs = [(imported(words, ours), imported(["-c", "import torch"], ours)) for _ in rounds]
        report(f"imports of a job of stage {stage} above `import torch`", *zip(*pairs, strict=True), "s")
    split = next((ours / "results" / "split").glob("*/split.csv")).relative_to(ours)
    (plain / "Snakefile").write_text('rule one:\n    output: "out"\n    shell: "true"\n')
    own = (*DRY_RUN, "--configfile", "tiny.yaml", "--force", split)
    pairs = [(measure(own, ours)[0], measure((*DRY_RUN, "--force", "out"), plain)[0]) for _ in range(5)]
    report("the inner Snakemake of a job, up to its shell, above that of one rule", *zip(*pairs, strict=True), "CPU s")
