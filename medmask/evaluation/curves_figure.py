"""Curves of the trainings by epoch: loss, validation, and whether flipped labels are found, mended or memorised."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from medmask.evaluation.cells import Cell
from medmask.evaluation.figures import COLOURS, DASHES, STYLE, message, wrapped

CURVES = {"loss/total": "training loss", "val/balanced_accuracy": "validation\nbalanced accuracy"}
FLIPPED = {  # of the training images, when last trained on
    "train/flipped_as_given": "flipped images classified\nas labelled, wrongly",
    "train/flipped_as_true": "flipped images classified\nas they truly are",
    "train/flipped_mended": "flipped images with\ntheir target mended",
    "train/auroc_weight": "AUROC of low weights\nfor flipped images",
    "train/auroc_trust": "AUROC of low trusts\nfor flipped images",
}
LABELS = CURVES | FLIPPED


@mpl.rc_context(STYLE)
def curves_figure(cells: Sequence[Cell]) -> Figure:
    """Loss, validation and what becomes of flipped images by epoch, a panel for each column of the table.

    A colour for each line of the table; seeds are thin, their mean is thick. Where one training of a panel has more
    than three times the epochs of another (few images, many epochs) the axis is the share of each training's epochs.
    """
    stages = [s for s in ("pretrain", "finetune") if any(run.history(s) for cell in cells for run in cell.runs)]
    if not stages:
        return message("No training has started yet")
    heads = list(dict.fromkeys(cell.head for cell in cells))
    lines = list(dict.fromkeys(cell.line for cell in cells))
    styles: list[dict[str, Any]] = [
        {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k // len(COLOURS) % len(DASHES)]}
        for k in range(len(lines))
    ]
    shown = [(stage, name, head) for stage in stages for name in names_of(cells, stage) for head in heads]
    wide = max(len(heads), 2)  # with a single column, loss and validation stand side by side
    high = math.ceil(len(shown) / wide)
    figure = Figure(figsize=(2.2 + 3.1 * wide, 0.6 + 2.2 * high), layout="constrained")
    grid = figure.subplots(high, wide, squeeze=False, sharey="row" if len(heads) > 1 else False).ravel()
    for ax in grid[len(shown) :]:
        ax.set_axis_off()
    for k, (ax, (stage, name, head)) in enumerate(zip(grid, shown, strict=False)):
        curves = [(c.line, [by_epoch(run.history(stage), name) for run in c.runs]) for c in cells if c.head == head]
        by_share = differ_in_length(curve for _, members in curves for curve in members)
        for line, members in curves:
            draw_curves(ax, members, styles[lines.index(line)], by_share)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=not by_share, min_n_ticks=1))
        if not ax.lines:
            ax.set_xticks([])
            ax.text(0.5, 0.5, "none", ha="center", va="center", transform=ax.transAxes)
        ax.grid(color="#e4e4e4", linewidth=0.6)
        if k % wide == 0 or len(heads) == 1:
            ax.set_ylabel(f"{stage}\n{LABELS[name]}")
        ax.set_title(head if k < wide else "")
        if by_share:
            ax.set_xlabel("share of the epochs")
    for column in range(wide):
        drawn = [ax for ax in grid[column : len(shown) : wide] if ax.lines]
        if drawn and not drawn[-1].get_xlabel():
            drawn[-1].set_xlabel("epoch")
    handles = [Line2D([], [], label=wrapped(line, 26), **style) for line, style in zip(lines, styles, strict=True)]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def names_of(cells: Sequence[Cell], stage: str) -> list[str]:
    """The curves of a stage: those of flipped images where a training has them."""
    known = {name for cell in cells for run in cell.runs for line in run.history(stage) for name in line}
    return [*CURVES, *(name for name in FLIPPED if name in known)]


def by_epoch(history: Sequence[dict[str, Any]], name: str) -> dict[int, float]:
    """Mean of a logged number in each epoch; what is not finite is left out."""
    values: dict[int, list[float]] = {}
    for line in history:
        number = line.get(name)
        if isinstance(number, int | float) and math.isfinite(number):
            values.setdefault(int(line["epoch"]), []).append(number)
    return {epoch: float(np.mean(numbers)) for epoch, numbers in sorted(values.items())}


def differ_in_length(curves: Iterable[dict[int, float]]) -> bool:
    """Whether the longest of the curves has more than three times the epochs of the shortest."""
    lengths = [max(curve) for curve in curves if curve]
    return bool(lengths) and max(lengths) > 3 * min(lengths)


def draw_curves(axes: Axes, curves: Sequence[dict[int, float]], style: dict[str, Any], by_share: bool) -> None:
    known = [curve for curve in curves if curve]
    last = max(map(max, known)) if known and by_share else 1
    for curve in known if len(known) > 1 else []:
        axes.plot(np.array(list(curve)) / last, list(curve.values()), lw=0.7, alpha=0.35, **style)
    shared = sorted(set.intersection(*map(set, known))) if known else []
    if shared:
        marker = "o" if len(shared) == 1 else None
        means = [np.mean([c[e] for c in known]) for e in shared]
        axes.plot(np.array(shared) / last, means, lw=1.8, marker=marker, **style)
