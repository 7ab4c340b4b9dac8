"""What an experiment names must exist: rows, fields, cells, test sets. Imports no torch and no numpy."""

from collections.abc import Mapping, Sequence
from typing import Any

from medmask.config.experiments import Experiment
from medmask.config.load import Blocks
from medmask.config.training import Training
from medmask.errors import ConfigError, lookup, suggest
from medmask.grid import Cell, row_axes

OF_A_SHORTCUT = ("raw", "bias_conflicting", "bias_aligned")


def check_experiment(name: str, experiment: Experiment, cells: Sequence[Cell], blocks: Blocks) -> None:
    """ConfigError for a name that stands for nothing."""
    where = f"experiments.{name}"
    if not cells:
        raise ConfigError(f"{where}.exclude: leaves no run")
    if experiment.reference:
        lookup(experiment.runs, experiment.reference, f"{where}.reference")
    check_exclude(name, experiment)
    sets = {test_set for cell in cells for test_set in test_sets(cell, blocks)}
    lookup(dict.fromkeys(sets), experiment.table.test_set, f"{where}.table.test_set")
    if (columns := experiment.table.columns) is not None:
        lookup({key: None for cell in cells for key in cell.fields()}, columns, f"{where}.table.columns")
    for i, number in enumerate(experiment.published):
        check_cells(cells, number.run, number.where, f"{where}.published[{i}]", experiment)
        lookup(dict.fromkeys(sets), number.test_set, f"{where}.published[{i}].test_set")
    if (claim := experiment.claim) is not None:
        lookup(dict.fromkeys(sets), claim.test_set, f"{where}.claim.test_set")
        check_cells(cells, claim.contrast[0], claim.where, f"{where}.claim", experiment)
        check_cells(cells, claim.contrast[1], {**claim.where, **claim.against}, f"{where}.claim", experiment)


def check_cells(cells: Sequence[Cell], row: str, where: dict[str, Any], key: str, experiment: Experiment) -> None:
    """A row and the fields of its cells must stand for at least one."""
    lookup(experiment.runs, row, key)
    own = [cell.fields() for cell in cells if cell.row == row]
    for field in where:
        lookup({name: None for fields in own for name in fields}, field, f"{key}.where")
    if not any(all(fields[field] == value for field, value in where.items()) for fields in own):
        raise ConfigError(f"{key}.where: {where} fits no run of {row}")


def check_exclude(name: str, experiment: Experiment) -> None:
    """Each rule must leave something out."""
    rows = {row: row_axes(name, experiment, row) for row in experiment.runs}
    rules = [(f"experiments.{name}", rows, rule) for rule in experiment.exclude]
    for row, block in experiment.runs.items():
        rules += [(f"experiments.{name}.runs.{row}", {row: rows[row]}, rule) for rule in block.exclude]
    for where, axes_of, rule in rules:
        for key in rule:
            lookup({axis: None for axes in axes_of.values() for axis in axes}, key, f"{where}.exclude")
        if not any(all(value in axes.get(key, ()) for key, value in rule.items()) for axes in axes_of.values()):
            raise ConfigError(f"{where}.exclude: {rule} fits no run")


def test_sets(cell: Cell, blocks: Blocks) -> list[str]:
    """Names of the test sets a cell is judged on; its evaluation may ask for no others than its split has."""
    split = blocks.block("split", cell.split, cell.changes("split"), cell.where())
    dataset = blocks.block("dataset", cell.dataset, cell.changes("dataset"), cell.where())
    found = ["test"] if isinstance(split.test, str) else list(split.test)
    if dataset.shortcut:
        if not isinstance(split.test, str):
            raise ConfigError(
                f"splits.{cell.split}.test: need one test list for dataset {cell.dataset}, whose shortcut makes the "
                f"test sets {', '.join(OF_A_SHORTCUT)}; got {', '.join(split.test)}"
            )
        found = list(OF_A_SHORTCUT)
    wanted = blocks.block("evaluate", cell.evaluate, cell.changes("evaluate"), cell.where()).test_sets
    for test_set in wanted or ():
        if test_set not in found:
            raise ConfigError(
                f"evaluations.{cell.evaluate}.test_sets: split {cell.split} has no test set {test_set!r}; "
                f"{suggest(test_set, found)}"
            )
    return found if wanted is None else list(wanted)


test_sets.__test__ = False  # type: ignore[attr-defined]


def check_trusted(block: Training, wish: Mapping[str, Any] | None, cell: Cell) -> None:
    """A training with trusted images needs a meta set, and no more of it in a step than it can have."""
    meta = getattr(block, "meta", None)
    if meta is None and "meta_set" not in block.train_on:
        return
    if not wish:
        raise ConfigError(
            f"splits.{cell.split}.meta_set: a needed key is missing: {cell.where()} trains with trusted images "
            f"({block.method}, train_on {', '.join(block.train_on)})"  # type: ignore[attr-defined]
        )
    most = wish.get("draw") or sum(wish.get("counts", {}).values())  # else the split tells
    if meta is not None and meta.size is not None and most and meta.size > most:
        raise ConfigError(
            f"finetunings.{cell.finetune}.meta.size: need at most the {most} images of splits.{cell.split}.meta_set, "
            f"got {meta.size}"
        )
