"""`python -m medmask doctor`: is a Slurm site, as the profile describes it, ready for a first submission?

Each line is `ok` or `problem`, and a problem says what to do. Slurm is asked whether it would take the jobs of the
config, and a short job in each partition looks at what a node sees. Exit code 0 when all is fine, 2 when not.
"""

import argparse
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmask import __version__, io
from medmask.artifacts import resources
from medmask.config.load import load_config
from medmask.plan import read_config
from medmask.runs import make_plan
from medmask.site import (
    Partition,
    Profile,
    call,
    min_job_age,
    read_partitions,
    read_profile,
    user_accounts,
    write_profile,
)

PROFILE = Path("profiles/slurm/config.yaml")
JOB_MINUTES = 2
TOKEN = "MEDMASK_DOCTOR_TOKEN"  # a file in the home folder's cache, which the node is to see
WAITING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` says what to do where it is a problem."""

    is_ok: bool
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"ok       {self.text}" if self.is_ok else f"problem  {self.text}\n         do: {self.remedy}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", type=Path, default=PROFILE, help=f"profile, file or folder ({PROFILE})")
    parser.add_argument("--write", action="store_true", help="first put the site's partitions and account into it")
    parser.add_argument(
        "--configfile", type=Path, nargs="+", default=[Path("config/config.yaml")], help="its jobs are to fit"
    )
    parser.add_argument("--wait-min", type=float, default=10, help="minutes that a test job may wait for a node (10)")
    parser.add_argument("--on-node", type=Path, help=argparse.SUPPRESS)  # what the test job runs


def main(args: argparse.Namespace) -> int:
    """Print the findings; returns the exit code."""
    if args.on_node:
        io.write_json(args.on_node, look_around())
        return 0
    is_fine = True
    for finding in examine(args):
        print(finding, flush=True)
        is_fine = is_fine and finding.is_ok
    return 0 if is_fine else 2


def examine(args: argparse.Namespace) -> Iterator[Finding]:
    """All findings, each as soon as it is known; without Slurm there is one."""
    if not shutil.which("sbatch"):
        remedy = "log in to the cluster, or load its Slurm module; without Slurm: snakemake --profile profiles/local"
        yield Finding(False, "no sbatch on this machine", remedy)
        return
    sinfo = call("sinfo", "--noheader", "--format=%P|%a|%l|%G")
    if not sinfo.is_ok:
        yield Finding(False, f"sinfo: {sinfo.text}", "ask the site whether Slurm's controller is up")
        return
    partitions = read_partitions(sinfo.text)
    yield Finding(True, f"{call('sbatch', '--version').text}, partitions {', '.join(partitions)}")
    path = args.profile / "config.yaml" if args.profile.is_dir() else args.profile
    if args.write:
        yield Finding(True, f"wrote {path}: {write_profile(path, partitions)}")
    profile = read_profile(path)
    yield check_states(profile)
    kinds = job_kinds(profile, args.configfile)
    named = sorted({name for name in (profile.partition_of("", 0), profile.partition_of("", 1)) if name})
    named = list(dict.fromkeys([*named, *(job["partition"] for job in kinds if job["partition"])]))
    first = [check_account(profile), *(check_partition(name, partitions, profile) for name in named)]
    yield from first
    if all(finding.is_ok for finding in first):  # else each line below would only say the same again
        yield from (check_job(job, partitions, profile) for job in kinds)
        yield from check_nodes([partitions[name] for name in named or partitions], profile, args.wait_min * 60)


def check_states(profile: Profile) -> Finding:
    """Where the executor plugin reads the states of jobs, and whether it finds them there."""
    sacct = call("sacct", "--noheader", "--allocations", "--starttime=now", "--format=jobid")
    squeue = call("squeue", "--noheader", "--me")
    if not (sacct.is_ok or squeue.is_ok):
        return Finding(
            False, f"sacct: {sacct.text}; squeue: {squeue.text}", "ask the site which of them users may call"
        )
    text = "sacct and squeue answer"
    if not sacct.is_ok:
        text = f"squeue answers, sacct does not ({sacct.text}): there will be no efficiency report"
    if profile.options.get("slurm-status-command") != "squeue":
        remedy = f"`slurm-status-command: squeue` in {profile.path}; else Snakemake waits for ever"
        return Finding(sacct.is_ok, text, remedy)
    age, first = min_job_age(), profile.options.get("slurm-init-seconds-before-status-checks", 40)
    if age is not None and age < 3 * first:  # with less the plugin asks sacct after all
        remedy = f"`slurm-init-seconds-before-status-checks: {max(1, age // 3)}` in {profile.path}"
        return Finding(False, f"squeue forgets a job {age} s after its end, which is too early", remedy)
    return Finding(True, text)


def check_account(profile: Profile) -> Finding:
    account, accounts = profile.account, user_accounts()
    if not account:
        return Finding(True, f"no account in the profile; yours: {', '.join(accounts) or 'none is known'}")
    if not accounts:
        return Finding(True, f"account {account}, which sacctmgr here cannot confirm")
    remedy = f"slurm_account in {profile.path}: one of {', '.join(accounts)}"
    is_yours = account in accounts
    return Finding(is_yours, f"account {account}" + ("" if is_yours else " is not yours"), remedy)


def check_partition(name: str, partitions: dict[str, Partition], profile: Profile) -> Finding:
    remedy = f"in {profile.path} name one of {', '.join(part.name for part in partitions.values() if part.is_up)}"
    if name not in partitions:
        return Finding(False, f"partition {name}: there is none of that name", remedy)
    found = partitions[name]
    if not found.is_up:
        return Finding(False, f"partition {name} is down", f"wait, or {remedy}")
    limit = "no time limit" if found.minutes is None else f"up to {found.minutes / 60:g} h"
    return Finding(True, f"partition {name}: {limit}" + (f", {found.gpus} GPUs a node" if found.gpus else ""))


def job_kinds(profile: Profile, configfile: list[Path]) -> list[dict[str, Any]]:
    """What the jobs of a config ask for, each kind once: rule, partition, nodes, and the resources of the rule."""
    kinds: list[dict[str, Any]] = []
    for stage, artifacts in make_plan(load_config(read_config(configfile, []))).artifacts.items():
        for artifact in artifacts.values():
            if artifact.settings.get("method") == "weights":
                continue  # loaded where Snakemake runs
            planned = {"nodes": 1, **resources(stage, artifact.settings)}
            rule = f"{stage}_ddp" if planned["ranks"] > 1 else stage
            given = {**profile.default, **profile.rules.get(rule, {})}
            given = {name: value for name, value in given.items() if name in planned and isinstance(value, int)}
            ranks = given.get("ranks", planned["ranks"])  # what the ranks ask for together follows their number
            together = {name: planned[name] * ranks // planned["ranks"] for name in ("gpu", "threads", "mem_mb")}
            job = planned | together | given
            kind = {"rule": rule, "partition": profile.partition_of(rule, job["gpu"]), **job}
            if kind not in kinds:
                kinds.append(kind)
    return kinds


def check_job(job: dict[str, Any], partitions: dict[str, Partition], profile: Profile) -> Finding:
    """Whether Slurm would take such a job."""
    nodes, ranks, memory = job["nodes"], job["ranks"], job["mem_mb"]
    asked = f"{ranks} rank{'s' * (ranks > 1)}, {job['threads']} cores, {memory / 1000:g} GB, {job['gpu']} GPUs"
    what = f"{job['rule']}: {asked}, {job['runtime'] / 60:g} h in {job['partition'] or 'the default partition'}"
    limit = partitions[job["partition"]].minutes if job["partition"] else None
    if limit is not None and job["runtime"] > limit:  # some sites take such a job, and never start it
        remedy = f"`needs: {{hours: {limit / 60:g}}}` in the config (a training goes on in further jobs)"
        return Finding(False, f"{what}: longer than the partition lets jobs run", remedy)
    options = [f"--time={job['runtime']}", f"--nodes={nodes}", f"--ntasks={ranks}", f"--mem={memory // nodes}"]
    options += [f"--cpus-per-task={job['threads'] // ranks}", *charge(job["partition"], profile)]
    options += [f"--gpus-per-node={job['gpu'] // nodes}"] if job["gpu"] else []
    answer = call("sbatch", "--test-only", *options, "--wrap=true")
    if answer.is_ok:
        return Finding(True, what)
    remedy = f"ask for what a node has: `needs` in the config, or set-resources in {profile.path}"
    return Finding(False, f"{what}: {answer.text}", remedy)


def charge(partition: str | None, profile: Profile) -> list[str]:
    options = {"partition": partition, "account": profile.account}
    return [f"--{name}={value}" for name, value in options.items() if value]


def check_nodes(partitions: list[Partition], profile: Profile, seconds: float) -> Iterator[Finding]:
    """Run a short job in each partition, all at the same time, and compare what they saw with what is here."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (Path("work"), cache):
        folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    with (
        tempfile.TemporaryDirectory(dir="work", prefix="doctor-", ignore_cleanup_errors=True) as name,
        tempfile.NamedTemporaryFile(dir=cache, prefix="medmask-doctor-") as token,
    ):
        folder = Path(name).resolve()
        sent = [send(folder, partition, profile, token.name) for partition in partitions]
        for partition, answer in zip(partitions, sent, strict=True):
            where = f"test job in {partition.name}"
            if answer.is_ok:
                yield from judge(folder, partition, answer.text.split(";")[0], where, end)
                if is_for_gpus(partition, profile) and (found := folder / f"{partition.name}.json").exists():
                    yield check_gpus(io.read_json(found), partition)
            else:
                yield Finding(False, f"{where}: {answer.text}", "what Slurm says here holds for every job")


def send(folder: Path, partition: Partition, profile: Profile, token: str) -> Any:
    """Submit the test job of a partition; its id is the answer."""
    command = [sys.executable, "-m", "medmask", "doctor", "--on-node", str(folder / f"{partition.name}.json")]
    options = [f"--time={JOB_MINUTES}", "--mem=2000", "--job-name=medmask-doctor", "--parsable", "--no-requeue"]
    options += [f"--output={folder / partition.name}.log", f"--chdir={Path.cwd()}", *charge(partition.name, profile)]
    options += ["--gpus-per-node=1"] if is_for_gpus(partition, profile) else []
    return call("sbatch", *options, f"--wrap={TOKEN}={shlex.quote(token)} {shlex.join(command)}")


def is_for_gpus(partition: Partition, profile: Profile) -> bool:
    return partition.gpus > 0 and partition.name == profile.partition_of("", 1)


def judge(folder: Path, partition: Partition, job_id: str, where: str, end: float) -> Iterator[Finding]:
    """Wait for a test job, and say what it found."""
    found, log, state = folder / f"{partition.name}.json", folder / f"{partition.name}.log", "waiting"
    while not found.exists() and state and time.monotonic() < end:
        time.sleep(1)
        answer = call("squeue", "--noheader", f"--jobs={job_id}", "--format=%T %r")
        state = answer.text if answer.text.startswith(WAITING) else ""
    if not found.exists() and not state:
        time.sleep(5)  # a shared folder may show a new file late
    if found.exists():
        yield from compare(io.read_json(found), look_around(), partition)
    elif state:
        call("scancel", job_id)
        yield Finding(False, f"{where}: still {state}", "come again when nodes are free, or wait longer: --wait-min 60")
    elif log.exists():
        last = (log.read_text(encoding="utf-8", errors="replace").strip() or "nothing").splitlines()[-1]
        remedy = f"make it work on a node: {sys.executable} -m medmask --version"
        yield Finding(False, f"{where} failed; it last wrote: {last}", remedy)
    else:
        remedy = "put this folder on a file system that the nodes share"
        yield Finding(False, f"{where} has ended, and neither its log nor its answer has come to {folder}", remedy)


def look_around() -> dict[str, Any]:
    """What a process sees where it runs."""
    given = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    gpus: list[str] = []
    if given and TOKEN in os.environ:
        import torch  # slow to import, and of use only on a node with GPUs

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": os.environ.get("SLURMD_NODENAME", platform.node()),
        "Python": f"{platform.python_version()} at {sys.executable}",
        "medmask": f"{__version__} at {Path(__file__).parent}, commit {io.commit()}",
        "cache": Path(os.environ.get(TOKEN, "/")).exists(),
        "given": len(given),
        "gpus": gpus,
    }


def compare(there: dict[str, Any], here: dict[str, Any], partition: Partition) -> Iterator[Finding]:
    """Findings about a node, from what was seen there and here."""
    where = f"{partition.name}, node {there['host']}"
    yield Finding(True, f"{where}: sees this folder")
    for name in ("Python", "medmask"):
        is_same = there[name] == here[name]
        text = f"{where}: {name} {there[name]}" + ("" if is_same else f", but here {here[name]}")
        yield Finding(is_same, text, "use one environment and one checkout, on a file system that the nodes share")
    sees = "sees" if there["cache"] else "does not see"
    remedy = "set XDG_CACHE_HOME to a folder that the nodes share; Snakemake keeps files of its jobs there"
    yield Finding(there["cache"], f"{where}: {sees} the cache folder of your home", remedy)


def check_gpus(there: dict[str, Any], partition: Partition) -> Finding:
    """Finding about the GPU that the test job asked for."""
    remedy = "compare nvidia-smi on the node with torch.version.cuda: the driver has to be new enough for it"
    if not there["given"]:
        remedy = "ask the site how a job gets a GPU: --gpus-per-node=1 left CUDA_VISIBLE_DEVICES empty"
    seen = f" ({', '.join(there['gpus'])})" if there["gpus"] else ""
    text = f"one GPU asked for, {there['given']} given, torch sees {len(there['gpus'])}{seen}"
    return Finding(0 < there["given"] == len(there["gpus"]), f"{partition.name}, node {there['host']}: {text}", remedy)
