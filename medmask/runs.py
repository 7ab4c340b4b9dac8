"""Experiments to runs, runs to artifacts. Imports no torch and no numpy: every job parses the workflow with it."""

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from medmask import io
from medmask.artifacts import VERSIONS, Artifact
from medmask.builder import Builder, Run
from medmask.checks import check_experiment
from medmask.config.base import CLEANLAB, PLANNED_METHODS
from medmask.config.load import Blocks
from medmask.errors import ConfigError
from medmask.grid import FIELDS, cells


@dataclass(frozen=True)
class Plan:
    """All runs of a config and, by stage and key, all artifacts."""

    blocks: Blocks
    runs: dict[str, list[Run]]
    artifacts: dict[str, dict[str, Artifact]]

    def experiment_runs(self) -> Iterator[Run]:
        """The runs of all experiments."""
        return itertools.chain.from_iterable(self.runs.values())

    def experiment_file(self, name: str) -> dict[str, Any]:
        """What `aggregate` has to know of an experiment, JSON-able."""
        experiment = self.blocks.config.experiments[name]
        settings = experiment.model_dump(
            mode="json", include={"title", "reference", "published", "claim", "table", "seeds", "seed_stages"}
        )
        labels = {row: block.label or row for row, block in experiment.runs.items()}
        return {
            "experiment": name,
            "settings": settings,
            "runs": [run_record(self.blocks, run, labels[run.cell.row]) for run in self.runs[name]],
        }

    def experiment_key(self, name: str) -> str:
        """Key of the experiment's runs file: changes with anything that a table depends on, names included."""
        content = self.experiment_file(name)
        content["runs"] = [{k: v for k, v in run.items() if k != "settings"} for run in content["runs"]]
        return f"{name}-{io.digest(content)[:12]}"


def run_record(blocks: Blocks, run: Run, label: str) -> dict[str, Any]:
    cell = run.cell
    source = cell.pretrain
    evaluation = blocks.block("evaluate", cell.evaluate, cell.changes("evaluate"))
    return {
        "run": cell.run,
        "row": cell.row,
        "label": label,
        **{field: getattr(cell, field) for field in FIELDS if field != "pretrain"},
        "pretrain": source if isinstance(source, str) else f"run:{source.run or cell.row}",
        "set": dict(cell.set),
        "seed": run.seed,
        "metrics": list(evaluation.metrics),
        "keys": {stage: artifact.key for stage, artifact in run.artifacts.items()},
        "settings": {stage: artifact.settings for stage, artifact in run.artifacts.items()},
    }


def make_plan(blocks: Blocks) -> Plan:
    """Expand all experiments.

    Raises
    ------
    ConfigError : an unknown block or row, a cycle, a contradiction between blocks, or training on test images.
    """
    builder = Builder(blocks)
    runs = {}
    for name, experiment in blocks.config.experiments.items():
        chosen = list(cells(name, experiment))
        check_experiment(name, experiment, chosen, blocks)
        runs[name] = [builder.run(cell, seed) for cell in chosen for seed in experiment.seeds]
    artifacts: dict[str, dict[str, Artifact]] = {stage: {} for stage in VERSIONS if stage != "runs"}
    for run in itertools.chain.from_iterable(runs.values()):
        for artifact in run.artifacts.values():
            collect(artifact, artifacts)
    return Plan(blocks, runs, artifacts)


def collect(artifact: Artifact, found: dict[str, dict[str, Artifact]]) -> None:
    """Add an artifact and all that it needs; the same key for another content is refused."""
    known = found[artifact.stage].setdefault(artifact.key, artifact)
    if known is artifact:
        for upstream in artifact.inputs.values():
            collect(upstream, found)
    elif known.digest != artifact.digest:
        raise ConfigError(f"{artifact.folder}: two different settings share this key; change either a little")


def refuse_unavailable(plan: Plan) -> None:
    """ConfigError for methods that come with a later version, or need what is not installed, before any job starts."""
    for stage, artifacts in plan.artifacts.items():
        for artifact in artifacts.values():
            method = artifact.settings.get("method")
            if method in PLANNED_METHODS:
                raise ConfigError(f"{stage} {artifact.key}: {method} is not in this version")
    if plan.artifacts["audit"] and importlib.util.find_spec("cleanlab") is None:
        raise ConfigError(f"finetunings: {CLEANLAB}")
