"""The cells of an experiment: the product of the axes of each row, without the excluded ones."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from medmask.config.experiments import Experiment
from medmask.config.finetuning import Source
from medmask.config.load import SECTIONS
from medmask.errors import ConfigError, suggest

FIELDS = ("dataset", "split", "noise", "pretrain", "finetune", "evaluate")
DEFAULTS = {"noise": "none", "pretrain": "none", "evaluate": "default"}


@dataclass(frozen=True)
class Cell:
    """One choice for each field of a row: the block names, and the changed keys."""

    experiment: str
    row: str
    run: str
    dataset: str
    split: str
    noise: str
    pretrain: str | Source
    finetune: str
    evaluate: str
    set: tuple[tuple[str, Any], ...] = ()

    def fields(self) -> dict[str, Any]:
        """Field and path to value, as `exclude` and `where` name them."""
        return {field: getattr(self, field) for field in FIELDS} | dict(self.set)

    def changes(self, field: str) -> tuple[tuple[str, Any], ...]:
        """The changed keys of one field's block, without the stage word."""
        return tuple((path.split(".", 1)[1], value) for path, value in self.set if path.split(".")[0] == field)

    def with_blocks(self, **names: str) -> "Cell":
        """The cell with other blocks; changed keys of the replaced ones do not follow."""
        kept = tuple(item for item in self.set if item[0].split(".")[0] not in names)
        return replace(self, set=kept, **names)

    def where(self) -> str:
        return f"experiments.{self.experiment}.runs.{self.row}"


def cells(name: str, experiment: Experiment, only: str | None = None) -> Iterator[Cell]:
    """All cells of an experiment, or of one of its rows: the product of the axes without the excluded ones."""
    for row_name in experiment.runs:
        if only in (None, row_name):
            yield from row_cells(name, experiment, row_name)


def row_axes(name: str, experiment: Experiment, row_name: str) -> dict[str, tuple]:
    """Field or path of a row to its choices, the experiment's where the row names none."""
    row, where = experiment.runs[row_name], f"experiments.{name}.runs.{row_name}"
    axes: dict[str, tuple] = {}
    for field in FIELDS:
        value = next((v for v in (getattr(row, field), getattr(experiment, field)) if v is not None), None)
        value = DEFAULTS.get(field) if value is None else value
        if value is None:
            raise ConfigError(f"{where}.{field}: a needed key is missing, here and in the experiment")
        axes[field] = value if isinstance(value, tuple) else (value,)
    for path, value in {**experiment.set, **row.set}.items():
        if path.split(".")[0] not in SECTIONS or "." not in path:
            raise ConfigError(f"{where}.set: need stage.key, got {path!r}; {suggest(path.split('.')[0], SECTIONS)}")
        axes[path] = tuple(value) if isinstance(value, list) else (value,)
    for axis, choices in axes.items():
        if not choices:
            raise ConfigError(f"{where}.{axis}: an empty list leaves no run")
    return axes


def row_cells(name: str, experiment: Experiment, row_name: str) -> Iterator[Cell]:
    axes = row_axes(name, experiment, row_name)
    excluded = [*experiment.exclude, *experiment.runs[row_name].exclude]
    paths = [axis for axis in axes if axis not in FIELDS]
    varied = [path for path in paths if len(axes[path]) > 1]
    for choice in itertools.product(*axes.values()):
        chosen = dict(zip(axes, choice, strict=True))
        if any(all(key in chosen and chosen[key] == value for key, value in rule.items()) for rule in excluded):
            continue
        changed = ",".join(f"{path.rsplit('.', 1)[-1]}={chosen[path]}" for path in varied)
        yield Cell(
            name,
            row_name,
            f"{row_name}[{changed}]" if changed else row_name,
            **{field: chosen[field] for field in FIELDS},
            set=tuple((path, chosen[path]) for path in paths),
        )
