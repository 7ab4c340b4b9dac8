"""Accuracy by group, class x cue, whatever test set holds a group: the worst of all is what a shortcut costs."""

from collections.abc import Sequence

from medmask.evaluation.cells import Cell, Measure
from medmask.evaluation.collect import Run
from medmask.evaluation.tables import Grid, mean_text

Group = tuple[str, bool]  # class, with the cue


def group_accuracies(run: Run, selection: str) -> dict[Group, float]:
    """Accuracy of each group that some test set has; sets that share a group share its images."""
    scores = (run.metrics or {}).get(selection, {}).values()
    rows = (row for score in scores for row in score.get("per_group", []))
    return {(row["class"], row["has_cue"]): row["accuracy"] for row in rows}


def group_grids(cells: Sequence[Cell], measure: Measure, decimals: int) -> list[Grid]:
    """A table with a column a group, and the worst of each seed; none where no test image carries a cue."""
    if not has_cues(cells, measure):
        return []
    by_cell = {cell.name: [group_accuracies(run, measure.selection) for run in cell.finished] for cell in cells}
    groups = sorted({group for seeds in by_cell.values() for seed in seeds for group in seed})
    heads = [f"{name}, cue" if has_cue else name for name, has_cue in groups]
    rows = [
        [
            name,
            *(mean_text([seed[group] for seed in seeds if group in seed], decimals) for group in groups),
            mean_text([min(seed.values()) for seed in seeds if seed], decimals),
        ]
        for name, seeds in by_cell.items()
        if seeds
    ]
    return [Grid("Accuracy by class and cue", ["", *heads, "worst of these"], rows)]


def has_cues(cells: Sequence[Cell], measure: Measure) -> bool:
    """Whether some test image carries a cue."""
    runs = (run for cell in cells for run in cell.finished)
    return any(cue for run in runs for _, cue in group_accuracies(run, measure.selection))


def group_notes(cells: Sequence[Cell], measure: Measure) -> list[str]:
    """How the table of groups is to be read."""
    if not has_cues(cells, measure):
        return []
    return [
        "Accuracy by class and cue: over all test sets, mean ± standard deviation over seeds; the worst is that of "
        "each seed, so it may be below every column. What makes one test set better can make another one worse."
    ]
