"""`python -m medmask plan`: what would run, what is done, and what each job asks for, before anything is submitted."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from medmask.artifacts import Artifact, resources
from medmask.config.load import load_config, read_yaml
from medmask.errors import ConfigError, MedmaskError
from medmask.grid import FIELDS
from medmask.runs import Plan, make_plan, refuse_unavailable

FINAL = {  # the file of each stage that is written last
    "data": "dataset.json", "split": "split.json", "noise": "transition.png", "pretrain": "record.json",
    "mask": "record.json", "audit": "record.json", "finetune": "record.json", "evaluate": "metrics.json",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--configfile", type=Path, nargs="+", default=[Path("config/config.yaml")], help="as snakemake's"
    )
    parser.add_argument("--config", nargs="*", default=[], metavar="KEY=VALUE", help="as snakemake's")
    parser.add_argument("--runs", action="store_true", help="list every run")


def main(args: argparse.Namespace) -> int:
    """Print the plan of a config; ConfigError when it breaks a rule."""
    plan = make_plan(load_config(read_config(args.configfile, args.config)))
    status = statuses(plan)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(job_table(plan, status))
    hours = sum(
        need["gpu"] * need["runtime"] / 60
        for stage, need in ((a.stage, resources(a.stage, a.settings)) for a in new(plan, status))
    )
    console.print(f"GPU-hours that new jobs may use at the most: {hours:g}")
    for experiment, runs in plan.runs.items():
        done = sum(status[run.artifacts["evaluate"].folder] == "done" for run in runs)
        console.print(f"{experiment}: {len(runs)} runs, {done} done, {len(runs) - done} new")
        for run in runs if args.runs else []:
            stages = ", ".join(f"{stage} {status[a.folder]}" for stage, a in run.artifacts.items())
            names = ", ".join(f"{field} {name}" for field, name in run.cell.fields().items() if field in FIELDS[1:5])
            console.print(f"  {run.cell.run} ({names}) seed {run.seed}: {stages}", highlight=False)
    for folder, why in status.items():
        if why not in ("done", "new"):
            console.print(f"runs again: {folder}: {why}", highlight=False)
    try:
        refuse_unavailable(plan)
    except MedmaskError as error:
        console.print(f"cannot run yet: {error}", highlight=False, markup=False)  # it may name [an extra]
    return 0


def read_config(files: list[Path], pairs: list[str]) -> dict[str, Any]:
    """Config files, later ones over earlier ones, then KEY=VALUE pairs, as snakemake merges them."""
    merged: dict[str, Any] = {}
    for path in files:
        merged = update(merged, read_yaml(path, "named sections"))
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found:
            raise ConfigError(f"--config: need KEY=VALUE, got {pair!r}")
        merged = update(merged, {key: yaml.safe_load(value)})
    return merged


def update(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{key: update(old[key], value) if key in old else value for key, value in new.items()}}


def statuses(plan: Plan) -> dict[str, str]:
    """Folder of each artifact: `done`, `new`, or why it runs again although its files are there."""
    found: dict[str, str] = {}

    def visit(artifact: Artifact) -> str:
        if artifact.folder not in found:
            last = Path(artifact.folder, FINAL[artifact.stage])
            before = {a.folder: visit(a) for a in artifact.inputs.values()}
            if not last.exists():
                found[artifact.folder] = "new"
            elif again := [folder for folder, state in before.items() if state != "done"]:
                found[artifact.folder] = f"its input {again[0]} runs first"
            elif newer := [a for a in artifact.inputs.values() if is_newer(a, last)]:
                found[artifact.folder] = f"its input {newer[0].folder} is newer (snakemake --touch keeps it)"
            else:
                found[artifact.folder] = "done"
        return found[artifact.folder]

    for artifacts in plan.artifacts.values():
        for artifact in artifacts.values():
            visit(artifact)
    return found


def is_newer(upstream: Artifact, file: Path) -> bool:
    return Path(upstream.folder, FINAL[upstream.stage]).stat().st_mtime > file.stat().st_mtime


def new(plan: Plan, status: dict[str, str]) -> list[Artifact]:
    return [a for artifacts in plan.artifacts.values() for a in artifacts.values() if status[a.folder] != "done"]


def job_table(plan: Plan, status: dict[str, str]) -> Table:
    """One line for jobs of a stage that ask for the same."""
    kinds: Counter[Any] = Counter()
    done: Counter[Any] = Counter()
    for artifacts in plan.artifacts.values():
        for artifact in artifacts.values():
            kind = (artifact.stage, *resources(artifact.stage, artifact.settings).values())
            kinds[kind] += 1
            done[kind] += status[artifact.folder] == "done"
    table = Table("stage", "jobs", "done", "to run", "ranks", "gpu", "cores", "mem GB", "time limit", title="jobs")
    for (stage, ranks, gpu, threads, memory, minutes), jobs in kinds.items():
        finished = done[stage, ranks, gpu, threads, memory, minutes]
        cells = (jobs, finished, jobs - finished, ranks, gpu, threads, f"{memory / 1000:g}")
        table.add_row(stage, *map(str, cells), f"{minutes // 60}:{minutes % 60:02d}")
    return table
