"""Figure of coverage and error: how many errors remain when a network answers only where it is confident."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from medmask.evaluation.cells import Cell, Measure
from medmask.evaluation.coverage import find_answers, selective_sets
from medmask.evaluation.figures import COLOURS, STYLE, message, mpl, wrapped

MOST_LINES = 8


@mpl.rc_context(STYLE)
def coverage_figure(cells: Sequence[Cell], measure: Measure, reference: str | None) -> Figure:
    """Error among the answers against the share answered: a panel for each test set, and for each column of the table.

    A colour for each line of the table; small dots are seeds, large ones their means.
    """
    sets = selective_sets(cells)
    if not sets:
        return message("No evaluation here has coverages")
    lines, n_lines = choose_lines(cells, measure.test_set if measure.test_set in sets else sets[0], reference)
    heads = list(dict.fromkeys(cell.head for cell in cells))
    figure = Figure(figsize=(2.6 + 3.0 * len(sets), 0.8 + 2.6 * len(heads)), layout="constrained")
    grid = figure.subplots(len(heads), len(sets), squeeze=False, sharex="col", sharey="col")
    for axes_of_head, head in zip(grid, heads, strict=True):
        for axes, name in zip(axes_of_head, sets, strict=True):
            for cell in (cell for cell in cells if cell.head == head and cell.line in lines):
                found = [each for each in find_answers(cell, name) if each.points]
                if not found:
                    continue
                seeds = [point for each in found for point in each.points]
                axes.plot(*zip(*seeds, strict=True), "o", color=lines[cell.line]["color"], ms=3, mew=0, alpha=0.4)
                means = [each.mean for each in found]
                axes.plot(*zip(*means, strict=True), marker="o", ms=4.5, lw=1.5, **lines[cell.line])
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.grid(color="#e4e4e4", linewidth=0.6)
            axes.set_title(", ".join(filter(None, (head, name))))
    figure.supxlabel("test images answered", size=10)
    figure.supylabel("errors among them", size=10)
    handles = [Line2D([], [], label=wrapped(line, 28), marker="o", ms=4.5, **style) for line, style in lines.items()]
    handles.append(Line2D([], [], color="#444444", marker="o", ms=3, lw=0, alpha=0.5, label="one seed"))
    figure.legend(handles=handles, loc="outside right upper", fontsize=9)
    if len(lines) < n_lines:
        first = "the reference and " if reference else ""
        figure.suptitle(f"{len(lines)} of {n_lines} rows: {first}the smallest errors", size=10)
    return figure


def choose_lines(cells: Sequence[Cell], test_set: str, reference: str | None) -> tuple[dict[str, dict[str, Any]], int]:
    """Lines of the table to draw, in its order, with their style, and how many there are.

    Of many: those of the reference row, then those with the smallest mean error over seeds and coverages; rows that
    answer nothing somewhere come last.
    """
    errors: dict[str, list[float]] = {}
    for cell in cells:
        points = [each.mean[1] for each in find_answers(cell, test_set) if each.points]
        if points:
            errors.setdefault(cell.line, []).extend(points)
    own = {cell.line for cell in cells if cell.row == reference}
    by_rank = sorted(errors, key=lambda line: (line not in own, -len(errors[line]), float(np.mean(errors[line]))))
    chosen = by_rank[:MOST_LINES]
    ordered = [line for line in errors if line in chosen]
    styles: list[dict[str, Any]] = [
        {"color": COLOURS[k % len(COLOURS)]} | ({"linestyle": "--", "mfc": "white"} if k >= len(COLOURS) else {})
        for k in range(len(ordered))
    ]
    return dict(zip(ordered, styles, strict=True)), len(errors)
