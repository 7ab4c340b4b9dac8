"""Selective classification of the cells of a table: share of the images answered and error among the answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medmask.evaluation.cells import Cell, Measure
from medmask.evaluation.tables import DASH, Grid, mean_text


@dataclass(frozen=True)
class Answers:
    """What the seeds of a cell answer on a test set when a share of the validation images is wanted.

    points : share of the test images answered, and error among them, of each seed that answers any.
    n_seeds : finished seeds.
    """

    wanted: float
    points: list[tuple[float, float]]
    n_seeds: int

    @property
    def mean(self) -> tuple[float, float]:
        """Mean share answered and mean error."""
        coverage, error = np.mean(self.points, axis=0)
        return float(coverage), float(error)


def find_answers(cell: Cell, test_set: str) -> list[Answers]:
    """One item a wanted coverage, small ones first; empty where the evaluation has none."""
    found: dict[float, list[tuple[float, float]]] = {}
    seeds: dict[float, int] = {}
    for run in cell.finished:
        for row in (run.metrics or {}).get("selective", {}).get(test_set, []):
            points = found.setdefault(row["wanted"], [])
            seeds[row["wanted"]] = seeds.get(row["wanted"], 0) + 1
            if row["error"] is not None:
                points.append((row["coverage"], row["error"]))
    return [Answers(wanted, found[wanted], seeds[wanted]) for wanted in sorted(found)]


def selective_sets(cells: Sequence[Cell]) -> list[str]:
    """Test sets with coverages."""
    finished = [run.metrics or {} for cell in cells for run in cell.finished]
    return list(dict.fromkeys(name for metrics in finished for name in metrics.get("selective", {})))


def coverage_grids(cells: Sequence[Cell], measure: Measure, decimals: int) -> list[Grid]:
    """A table of the errors with one column a wanted coverage, on the table's test set; none without coverages."""
    by_cell = {cell.name: {found.wanted: found for found in find_answers(cell, measure.test_set)} for cell in cells}
    wanted = sorted({share for found in by_cell.values() for share in found})
    if not wanted:
        return []
    rows = [
        [name, *(answer_text(found[share], decimals) if share in found else DASH for share in wanted)]
        for name, found in by_cell.items()
        if found
    ]
    return [Grid("Error when so many are answered", ["", *(f"{100 * share:g} % wanted" for share in wanted)], rows)]


def answer_text(found: Answers, decimals: int) -> str:
    """`error ± sd (share answered)`, and how many seeds answer nothing."""
    silent = found.n_seeds - len(found.points)
    if not found.points:
        return "nothing answered"
    coverage, _ = found.mean
    none = f", {silent} of {found.n_seeds} seeds answer nothing" if silent else ""
    errors = mean_text([error for _, error in found.points], decimals)
    return f"{errors} ({100 * coverage:.1f} %{none})"


def coverage_notes(cells: Sequence[Cell], measure: Measure) -> list[str]:
    """What the table of coverages shows."""
    if measure.test_set not in selective_sets(cells):
        return []
    return [
        "Coverages: a threshold on the confidence answers the wanted share of the validation images; shown is the "
        f"error among the images of test set {measure.test_set} that it answers, last epoch, ± standard deviation "
        "over seeds, and in parentheses the share of them. Rows finetuned on masked images: scores of the networks "
        "before and after masking together."
    ]
