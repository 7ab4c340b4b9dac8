"""The doctor, at sites that are made up, and at a real one."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from medmask import cli, io, site
from medmask.doctor import check_gpus, compare
from medmask.errors import ConfigError
from medmask.site import Partition, gpu_count, read_partitions, read_profile, to_minutes, write_profile

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "profiles" / "slurm" / "config.yaml"
TINY = ROOT / "tests" / "fixtures" / "config_tiny.yaml"
GPU = Partition("gpu", is_default=False, is_up=True, minutes=60, gpus=8)


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("infinite", None), ("30:00", 30), ("12:00:00", 720), ("2-00:00:00", 2880), ("1-12:30:00", 2190), ("n/a", None)],
)
def test_time_limits(limit, minutes):
    assert to_minutes(limit) == minutes


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [("(null)", 0), ("gpu:8", 8), ("gpu:a100:4(S:0-1),shard:4", 4), ("gpu:a100:2,gpu:h100:2", 4), ("gpu_mem:80", 0)],
)
def test_gpus_of_a_node(gres, gpus):
    assert gpu_count(gres) == gpus


def test_partitions_of_several_lines():
    found = read_partitions("main*|up|1:00:00|(null)\nbig|down|infinite|gpu:2\nbig|down|infinite|gpu:8")
    assert found["main"] == Partition("main", is_default=True, is_up=True, minutes=60, gpus=0)
    assert found["big"] == Partition("big", is_default=False, is_up=False, minutes=None, gpus=8)


def test_profile_says_where_jobs_go(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("""
default-resources: ["slurm_partition='main'", gpu_partition=big, "slurm_account='x y'"]
set-resources: {evaluate: {slurm_partition: quick}}
""")
    profile = read_profile(path)
    assert profile.account == "x y"
    assert profile.partition_of("finetune", 0) == "main"
    assert profile.partition_of("finetune", 8) == "big"
    assert profile.partition_of("evaluate", 8) == "quick"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("- a", "need `option: value`, got list"),
        ("set-resources: [a]", "set-resources: need `rule"),
    ],
)
def test_broken_profile(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_profile(tmp_path / "config.yaml")


@pytest.fixture
def profile(tmp_path, monkeypatch) -> Path:
    """A copy of the shipped profile, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(SHIPPED, tmp_path / "profile.yaml"))


def test_write_changes_the_facts_and_nothing_else(profile, monkeypatch):
    monkeypatch.setattr(site, "user_accounts", lambda: ["physics", "lab"])
    partitions = read_partitions("old|down|infinite|gpu:16\nmain*|up|infinite|(null)\nfat|up|infinite|gpu:4")
    write_profile(profile, partitions)
    before, after = SHIPPED.read_text().splitlines(), profile.read_text().splitlines()
    changed = {line.split(" # ")[0].strip() for line in set(after) - set(before)}
    assert changed == {
        "- slurm_partition='main'", "- gpu_partition='fat'", "- slurm_account='physics'"
    }  # fmt: skip
    assert len(before) == len(after)
    monkeypatch.setattr(site, "user_accounts", list)
    write_profile(profile, partitions)
    assert read_profile(profile).account is None


def test_write_needs_the_lines(profile):
    profile.write_text("jobs: 1\n")
    with pytest.raises(ConfigError, match=r"need one line `- slurm_partition=...`"):
        write_profile(profile, {"gpu": GPU})


def test_what_differs_on_a_node_is_said():
    here = {"host": "login", "Python": "3.11.7 at /a", "medmask": "0.1.0 at /m", "cache": True}
    there = {"host": "n1", "Python": "3.9.2 at /b", "medmask": "0.1.0 at /m", "cache": False}
    folder, python, package, cache = compare(there, here, GPU)
    assert folder.is_ok
    assert package.is_ok
    assert not python.is_ok
    assert "3.9.2 at /b, but here 3.11.7 at /a" in python.text
    assert not cache.is_ok
    assert "XDG_CACHE_HOME" in cache.remedy


@pytest.mark.parametrize(
    ("given", "seen", "is_ok", "remedy"),
    [(1, ["A100"], True, ""), (1, [], False, "nvidia-smi"), (0, [], False, "left CUDA_VISIBLE_DEVICES empty")],
)
def test_gpu_of_a_node(given, seen, is_ok, remedy):
    finding = check_gpus({"host": "n1", "given": given, "gpus": seen}, GPU)
    assert finding.is_ok == is_ok
    assert remedy in finding.remedy


def doctor(*arguments: object) -> int:
    return cli.main(["doctor", "--configfile", str(TINY), *map(str, arguments)])


def test_no_slurm(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor() == 2
    first, second = capsys.readouterr().out.splitlines()
    assert first == "problem  no sbatch on this machine"
    assert "profiles/local" in second


def made_up(folder: Path, monkeypatch, **answers: str) -> None:
    """Commands of a site: what each prints; `!` for one that fails with that text."""
    answers = {"sbatch": "", "sacct": "", "squeue": "", "sacctmgr": "lab", "scontrol": "MinJobAge = 300 sec"} | answers
    (folder / "bin").mkdir()
    for name, text in answers.items():
        script = f"echo '{text[1:]}' >&2; exit 1" if text.startswith("!") else f"echo '{text}'"
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


SITE = "cpu*|up|2-00:00:00|(null)\ngpu|up|infinite|gpu:8"


@pytest.mark.parametrize(
    ("answers", "changes", "said"),
    [
        ({"sinfo": "!slurm_load_partitions: Unable to contact"}, {}, "problem  sinfo: slurm_load_partitions: Unable"),
        ({"sinfo": SITE.replace("gpu|", "fat|")}, {}, "problem  partition gpu: there is none of that name"),
        ({"sinfo": SITE.replace("gpu|up", "gpu|down")}, {}, "problem  partition gpu is down"),
        ({"sinfo": SITE}, {"slurm_account": "other"}, "problem  account other is not yours"),
        ({"sinfo": SITE, "sacct": "!disabled", "squeue": "!no"}, {}, "problem  sacct: disabled; squeue: no"),
        ({"sinfo": SITE.replace("2-00:00:00", "30:00")}, {}, "1 h in cpu: longer than the partition lets jobs run"),
        ({"sinfo": SITE, "sbatch": "!sbatch: error: Memory"}, {}, "6 h in cpu: sbatch: error: Memory"),
    ],
)
def test_problems_of_a_site(profile, monkeypatch, capsys, answers, changes, said):
    made_up(profile.parent, monkeypatch, **answers)
    content = yaml.safe_load(profile.read_text())
    content["default-resources"] += [f"{name}='{value}'" for name, value in changes.items()]
    profile.write_text(yaml.safe_dump(content))
    assert doctor("--profile", profile, "--wait-min", 0) == 2
    lines = capsys.readouterr().out.splitlines()
    place = next((n for n, line in enumerate(lines) if said in line), None)
    assert place is not None, lines
    assert lines[place + 1].startswith("         do: ")


@pytest.mark.parametrize(
    ("age", "sacct", "said"),
    [
        (60, "", "problem  squeue forgets a job 60 s after its end"),
        (300, "", "ok       sacct and squeue answer"),
        (300, "!disabled", "ok       squeue answers, sacct does not (disabled)"),
    ],
)
def test_squeue_has_to_know_jobs_for_long_enough(profile, monkeypatch, capsys, age, sacct, said):
    made_up(profile.parent, monkeypatch, sinfo=SITE, sacct=sacct, scontrol=f"MinJobAge = {age} sec")
    doctor("--profile", profile, "--wait-min", 0)
    assert said in capsys.readouterr().out


def test_plugin_has_to_ask_a_command_that_answers(profile, monkeypatch, capsys):
    made_up(profile.parent, monkeypatch, sinfo=SITE, sacct="!disabled")
    profile.write_text(profile.read_text().replace("slurm-status-command: squeue", ""))
    assert doctor("--profile", profile, "--wait-min", 0) == 2
    said = capsys.readouterr().out
    assert "problem  squeue answers, sacct does not (disabled)" in said
    assert f"do: `slurm-status-command: squeue` in {profile}" in said


@pytest.fixture
def own_profile(profile, slurm) -> Path:
    """A profile that the doctor has filled in at the real site."""
    io.commit.cache_clear()  # a node looks again
    write_profile(profile, read_partitions(site.call("sinfo", "--noheader", "--format=%P|%a|%l|%G").text))
    return profile


def problems(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("problem")]


@pytest.mark.slurm
def test_all_is_fine(own_profile, tmp_path, monkeypatch, capsys):
    package = tmp_path / "made_up" / "torch"  # one that sees a GPU: these nodes have none that torch could see
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from torch import cuda\n")
    (package / "cuda.py").write_text("device_count = lambda: 1\nget_device_name = lambda i: 'A100'\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    assert doctor("--profile", own_profile, "--write") == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "wrote profile.yaml" in said.replace(str(own_profile), "profile.yaml")
    assert "ok       account lab" in said
    assert "one GPU asked for, 1 given, torch sees 1 (A100)" in said
    assert f"Python {'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}" in said
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.slurm
def test_gpus_that_torch_does_not_see(own_profile, capsys):
    assert doctor("--profile", own_profile) == 2
    said = capsys.readouterr().out
    (problem,) = problems(said)
    assert problem.endswith("one GPU asked for, 1 given, torch sees 0")


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("slurm_account='lab'", "slurm_account='nolab'", "account nolab is not yours"),
        ("gpu_partition='gpu'", "gpu_partition='h100'", "partition h100: there is none of that name"),
        ("retries: 3", "set-resources: {finetune: {runtime: 100000}}", "longer than the partition lets jobs run"),
        ("retries: 3", "set-resources: {pretrain_ddp: {gpu: 16}}", "node configuration is not available"),
    ],
)
def test_problems_at_a_real_site(own_profile, capsys, old, new, said):
    own_profile.write_text(own_profile.read_text().replace(old, new))
    assert doctor("--profile", own_profile, "--wait-min", 0) == 2
    assert said in problems(capsys.readouterr().out)[0]


@pytest.mark.slurm
def test_python_that_is_not_on_the_node(own_profile, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert doctor("--profile", own_profile) == 2
    assert "failed; it last wrote" in problems(capsys.readouterr().out)[0]


@pytest.mark.slurm
def test_no_node_in_time(own_profile, capsys):
    assert doctor("--profile", own_profile, "--wait-min", 0) == 2
    assert "still" in problems(capsys.readouterr().out)[0]
