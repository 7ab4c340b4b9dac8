"""Read what the stages have left of an experiment's runs; a run that is not finished says why."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import TypeAdapter, ValidationError

from medmask import io
from medmask.config.data import Dataset, Noise, Split
from medmask.config.experiments import Evaluation
from medmask.config.finetuning import AnyFinetuning, Audit, SaliencyMaps
from medmask.config.training import Pretraining
from medmask.errors import DataError
from medmask.evaluation.metrics import Sample

FIELDS = ("dataset", "split", "noise", "pretrain", "finetune", "evaluate")
MODELS: dict[str, Any] = {
    "data": Dataset, "split": Split, "noise": Noise,
    "pretrain": Pretraining, "mask": SaliencyMaps, "audit": Audit, "finetune": AnyFinetuning, "evaluate": Evaluation,
}  # fmt: skip
# The file that stands when a stage is done: the last of its outputs.
DONE = {
    "data": "dataset.json",
    "split": "split.json",
    "noise": "transition.json",
    "pretrain": "record.json",
    "mask": "record.json",
    "audit": "record.json",
    "finetune": "record.json",
    "evaluate": "metrics.json",
}
PREDICTIONS = {"last": "predictions.csv", "best": "predictions_best.csv"}


def read_predictions(path: Path) -> pd.DataFrame:
    """A predictions file; names stay text, whatever they look like."""
    text = {"test_set": str, "image_id": str, "group": str}
    return pd.read_csv(path, dtype=text, keep_default_na=False)


def test_sample(table: pd.DataFrame, test_set: str) -> tuple[Sample, list[str]]:
    """Labels and probabilities of one test set in a predictions table, and the group of each image."""
    part = table[table["test_set"] == test_set]
    probs = part[[name for name in part.columns if name.startswith("prob_")]].to_numpy(dtype=float)
    cue = part["has_cue"].to_numpy().astype(bool) if "has_cue" in part else None
    return Sample(part["label"].to_numpy(dtype=np.int64), probs, cue), part["group"].tolist()


test_sample.__test__ = False  # type: ignore[attr-defined]  # no test, whatever pytest makes of its name


@dataclass(eq=False)
class Run:
    """One planned run. `plan` is its entry in the runs file, `metrics` is None as long as it is not finished."""

    plan: dict[str, Any]
    results: Path
    metrics: dict[str, Any] | None = None
    reason: str = ""
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return self.plan[name]

    @property
    def finished(self) -> bool:
        return self.metrics is not None

    @property
    def fields(self) -> dict[str, Any]:
        """What the run was chosen by: its blocks and its changed keys."""
        return {name: self.plan[name] for name in FIELDS} | self.plan["set"]

    def path(self, stage: str, name: str) -> Path | None:
        """A file of one of the run's artifacts; None where the run has no such stage."""
        key = self.plan["keys"].get(stage)
        return self.results / stage / key / name if key else None

    def read(self, stage: str, name: str) -> Any:
        """A JSON file of the run; an empty dict where it is not there, or broken."""
        path = self.path(stage, name)
        return read_or_nothing(path) if path else {}

    def records(self) -> list[dict[str, Any]]:
        """Records of the run's trainings in the order of their making, those that an audit rests on included."""
        networks = self.read("audit", "config.json").get("inputs", {}).get("networks", [])
        files = [self.results / "finetune" / Path(network).parent.name / "record.json" for network in networks]
        folds = map(read_or_nothing, files)
        found = [self.read("pretrain", "record.json"), *folds, self.read("finetune", "record.json")]
        return [record for record in found if record]

    @cached_property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Settings of each stage with all defaults filled in."""
        return {stage: resolve(stage, given) for stage, given in self.plan["settings"].items()}

    @property
    def has_flips(self) -> bool:
        return self.settings.get("noise", {}).get("rate", 0) > 0

    def has_noisy_validation(self, training: dict[str, Any]) -> bool:
        """Whether flipped labels are among those that choose the best epoch of a training, given by its settings."""
        is_noisy = training.get("validation_labels") == "noisy"
        return self.has_flips and is_noisy and "val" in self.settings["noise"].get("sides", [])

    def history(self, stage: str) -> list[dict[str, Any]]:
        """The lines of a training's history; lines that are cut off are left out."""
        path = self.path(stage, "history.jsonl")
        return list(json_lines(path)) if path and path.exists() else []

    def weights(self) -> pd.DataFrame:
        """What the finetuning gave each training image: epoch, weight, trust, is_flipped; empty without such a file."""
        path = self.path("finetune", "weights.csv")
        if path is None or not path.exists():
            return pd.DataFrame({"epoch": []})
        return pd.read_csv(path, dtype={"image_id": str})

    def score(self, selection: str, test_set: str) -> dict[str, Any]:
        """The run's numbers on a test set; empty where there are none."""
        return self.metrics[selection].get(test_set, {}) if self.metrics else {}

    def value(self, selection: str, test_set: str, metric: str) -> float | None:
        return self.score(selection, test_set).get("metrics", {}).get(metric, {}).get("value")

    def sample(self, selection: str, test_set: str) -> tuple[Sample, list[str]]:
        """Predictions on a test set, in the order of the image ids, and the images' groups."""
        path = self.path("evaluate", PREDICTIONS[selection])
        assert path is not None
        return test_sample(read_predictions(path).sort_values("image_id", kind="stable"), test_set)


def read_or_nothing(path: Path) -> Any:
    try:
        return io.read_json(path)
    except (OSError, DataError):
        return {}


def resolve(stage: str, given: dict[str, Any]) -> dict[str, Any]:
    try:
        return TypeAdapter(MODELS[stage]).validate_python(given).model_dump(mode="json")
    except (KeyError, ValidationError):
        return given  # settings of an older version: shown as they are


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def read_runs(path: Path) -> tuple[dict[str, Any], list[Run]]:
    """The runs file and, for each of its runs, what is there.

    Parameters
    ----------
    path : `results/runs/<key>/runs.json`; the artifacts are looked up in its `results`.
    """
    content = io.read_json(path)
    missing = {"experiment", "settings", "runs"} - set(content)
    if missing:
        raise DataError(f"{path}: need the keys experiment, settings and runs, got no {', '.join(sorted(missing))}")
    results = path.resolve().parents[2]
    return content, [read_run(plan, results) for plan in content["runs"]]


def read_run(plan: dict[str, Any], results: Path) -> Run:
    run = Run(plan, results)
    path = run.path("evaluate", DONE["evaluate"])
    if path is None or not path.exists():
        run.reason = first_missing(run)
        return run
    try:
        run.metrics = io.read_json(path)
    except (OSError, DataError) as error:
        run.reason = f"evaluate: {error}"
        return run
    absent = [name for name in PREDICTIONS.values() if not path.with_name(name).exists()]
    if absent:
        run.metrics, run.reason = None, f"evaluate: {', '.join(absent)} is missing beside {DONE['evaluate']}"
    return run


def first_missing(run: Run) -> str:
    """The first stage whose files are not there, and what its log says about it."""
    for stage, name in DONE.items():
        path = run.path(stage, name)
        if path is not None and not path.exists():
            log = run.results.parent / "logs" / stage / f"{path.parent.name}.log"
            return f"{stage}: {last_error(log)}"
    return "evaluate: not part of the plan"


def last_error(log: Path) -> str:
    """The last line of a log that speaks of an error, or else of a stop, without colours."""
    if not log.exists():
        return "not run yet (no log)"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line for line in lines if "error" in line.lower()] or [line for line in lines if "stop" in line]
    if not found:
        return f"stopped without an error in its log ({log.name})"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", found[-1])
    return " ".join(plain.split())[:300]
