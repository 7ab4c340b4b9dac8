"""From runs to the cells of a table: means over seeds, paired differences, published numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from medmask import io
from medmask.evaluation.bootstrap import bootstrap
from medmask.evaluation.collect import FIELDS, Run
from medmask.evaluation.metrics import Array, why_undefined
from medmask.evaluation.statistics import Estimate, estimate, holm, paired_difference, prediction_interval


@dataclass(frozen=True)
class Measure:
    """What a cell shows: a metric, on a test set, of the last or the best epoch."""

    metric: str
    test_set: str
    selection: str


@dataclass(eq=False)
class Cell:
    """All seeds of one choice of blocks and keys.

    line, column : where it stands in the table; `axis` is the field whose values are the columns, or empty.
    difference : this cell minus `compared_with`.
    """

    runs: list[Run]
    line: str
    column: str
    axis: str = ""
    main: Estimate | None = None
    why: str = ""
    difference: Estimate | None = None
    compared_with: str = ""
    holm_p: float | None = None
    published: dict[str, Any] | None = None
    verdict: str = "none published"
    draws: dict[int, Array] = field(default_factory=dict)  # seed: draws of the metric
    judged_on: str = ""  # digest of the groups and labels of the test images

    @property
    def row(self) -> str:
        return str(self.runs[0]["row"])

    @property
    def fields(self) -> dict[str, Any]:
        return self.runs[0].fields

    @property
    def head(self) -> str:
        """Heading of its column; empty where there are none."""
        return f"{self.axis.rsplit('.', 1)[-1]} {self.column}" if self.axis else ""

    @property
    def name(self) -> str:
        return f"{self.line}, {self.head}" if self.axis else self.line

    @property
    def split_key(self) -> str:
        """Names the split: cells with the same one are judged on the same images, and so may others be."""
        return str(self.runs[0]["keys"].get("split"))

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def reasons(self) -> dict[int, str]:
        """Seed: why it has not finished."""
        return {run["seed"]: run.reason for run in self.runs if not run.finished}

    def value(self, seed: int, measure: Measure) -> float | None:
        run = next(run for run in self.runs if run["seed"] == seed)
        return run.value(measure.selection, measure.test_set, measure.metric)

    def mean(self, measure: Measure) -> float | None:
        values = [run.value(measure.selection, measure.test_set, measure.metric) for run in self.finished]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None


def make_cells(runs: Sequence[Run], columns: str | None) -> list[Cell]:
    """Group runs that differ in the seed alone; name their line and column.

    A line is a row of the experiment. Where a row has several cells in a column, the fields that tell them apart
    are added to its name, so each has a line of its own.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run["row"], *((k, repr(v)) for k, v in run.fields.items())), []).append(run)
    cells = []
    for members in groups.values():
        first = members[0]
        siblings = [group[0].fields for group in groups.values() if group[0]["row"] == first["row"]]
        varied = [
            name for name, value in first.fields.items()
            if name != columns and any(other.get(name) != value for other in siblings)
        ]  # fmt: skip
        extra = ", ".join(f"{name.rsplit('.', 1)[-1]} {first.fields[name]}" for name in varied)
        line = f"{first['label']} ({extra})" if extra else str(first["label"])
        column = str(first.fields.get(columns, "")) if columns else ""
        cells.append(Cell(sorted(members, key=lambda run: run["seed"]), line, column, columns or ""))
    return cells


def measure_cells(cells: Sequence[Cell], measure: Measure, draws: int) -> None:
    """Fill in the mean over seeds with its interval, or why there is none."""
    for cell in cells:
        values: dict[int, float] = {}
        for run in cell.finished:
            value = run.value(measure.selection, measure.test_set, measure.metric)
            if value is None:
                cell.why = undefined_reason(run, measure)
                continue
            sample, groups = run.sample(measure.selection, measure.test_set)
            assert why_undefined(measure.metric, sample) is None
            cell.judged_on = io.digest([groups, sample.labels.tolist()])
            cell.draws[run["seed"]] = bootstrap(sample, groups, [measure.metric], draws=draws)[measure.metric]
            values[run["seed"]] = value
        if values:
            cell.main = estimate(list(values.values()), np.stack(list(cell.draws.values())))


def undefined_reason(run: Run, measure: Measure) -> str:
    score = run.score(measure.selection, measure.test_set)
    if not score:
        return f"it has no test set {measure.test_set}"
    return str(score["metrics"].get(measure.metric, {}).get("why", "not computed"))


def partner(cell: Cell, others: Sequence[Cell]) -> Cell | None:
    """The cell that shares the test images and most of the other choices; None if no single one does."""
    same = [other for other in others if cell.split_key == other.split_key or cell.judged_on == other.judged_on != ""]
    for name in ("noise", "evaluate", "pretrain", "finetune", *(key for key in cell.fields if key not in FIELDS)):
        alike = [other for other in same if other.fields.get(name) == cell.fields[name]]
        same = alike or same
    return same[0] if len(same) == 1 else None


def difference(a: Cell, b: Cell, measure: Measure) -> Estimate | None:
    """Cell a minus cell b over the seeds that both have finished; None if there are none."""
    seeds = [seed for seed in a.draws if seed in b.draws]
    if not seeds:
        return None
    values = [[cell.value(seed, measure) or 0.0 for seed in seeds] for cell in (a, b)]
    return paired_difference(values[0], values[1], *(np.stack([cell.draws[s] for s in seeds]) for cell in (a, b)))


def compare_cells(cells: Sequence[Cell], reference: str | None, measure: Measure) -> None:
    """Difference of each cell to its counterpart in the reference row, with p-values corrected over all of them."""
    others = [cell for cell in cells if cell.row == reference]
    for cell in cells:
        other = partner(cell, others) if cell.row != reference else None
        if other is not None:
            cell.compared_with = other.name
            cell.difference = difference(cell, other, measure)
    compared = [cell for cell in cells if cell.difference and cell.difference.p_value is not None]
    corrected = holm([cell.difference.p_value for cell in compared])  # type: ignore[union-attr, misc]
    for cell, p_value in zip(compared, corrected, strict=True):
        cell.holm_p = p_value


def find_published(
    fields: dict[str, Any], row: str, published: Sequence[dict[str, Any]], metric: str, test_set: str
) -> dict[str, Any] | None:
    """The published number of a cell: the first that names its row, fields, metric and test set."""
    for number in published:
        if (number["run"], number["metric"], number["test_set"]) == (row, metric, test_set) and matches(
            fields, number["where"]
        ):
            return number
    return None


def matches(fields: dict[str, Any], where: dict[str, Any]) -> bool:
    return all(fields.get(name) == value for name, value in where.items())


def judge_published(cells: Sequence[Cell], published: Sequence[dict[str, Any]], measure: Measure) -> None:
    """Set beside each cell its published number and whether it lies within what one more run would give."""
    for cell in cells:
        cell.published = find_published(cell.fields, cell.row, published, measure.metric, measure.test_set)
        if cell.published is not None:
            cell.verdict = verdict(cell.main, cell.published)
        elif others := [n["metric"] for n in published if n["run"] == cell.row and matches(cell.fields, n["where"])]:
            cell.verdict = f"published for {', '.join(dict.fromkeys(others))} alone"


def verdict(ours: Estimate | None, published: dict[str, Any]) -> str:
    """`inside` or `outside` the 95 % prediction interval, or `not comparable` with the reason."""
    if published.get("not_comparable"):
        return f"not comparable: {published['not_comparable']}"
    if ours is None:
        return "not comparable: no run finished"
    if ours.sd is None:
        return "not comparable: one seed has no spread"
    if not published.get("n"):
        return "not comparable: the number of published test images is not given"
    low, high = prediction_interval(ours.value, ours.sd, ours.n_seeds, published["n"])
    return "inside" if low <= published["value"] <= high else "outside"


def select_cells(cells: Sequence[Cell], row: str, where: dict[str, Any]) -> list[Cell]:
    """Fresh copies of the cells of a row that match, without their numbers."""
    return [
        replace(cell, main=None, why="", difference=None, draws={})
        for cell in cells
        if cell.row == row and matches(cell.fields, where)
    ]
