"""Figures of an experiment. Drawn on Figure objects without pyplot, so no display is ever needed."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from medmask.evaluation.cells import Cell, Measure
from medmask.evaluation.collect import Run
from medmask.evaluation.metrics import auroc
from medmask.evaluation.tables import constant_lines

# Okabe and Ito (2008): told apart under all common forms of colour blindness; yellow left out, too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
MOST_PANELS = 12
STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "medmask",
    "legend.frameon": False, "axes.titlesize": 10,
}  # fmt: skip


def save(figure: Figure, png: Path, svg: Path) -> None:
    """Write both formats; the same figure gives the same SVG."""
    with mpl.rc_context(STYLE):
        figure.savefig(png, format="png", dpi=150, bbox_inches="tight")
        figure.savefig(svg, format="svg", metadata={"Date": None}, bbox_inches="tight")


def message(text: str) -> Figure:
    """A figure that says why there is nothing to see."""
    figure = Figure(figsize=(5, 1.5))
    figure.text(0.5, 0.5, text, ha="center", va="center", size=12)
    return figure


def wrapped(text: str, width: int) -> str:
    """Text over several lines, broken at blanks."""
    return "\n".join(textwrap.wrap(text, width, break_long_words=False)) or text


@mpl.rc_context(STYLE)
def metric_figure(cells: Sequence[Cell], measure: Measure) -> Figure:
    """The metric by line: mean with interval, seeds as dots, published numbers that are comparable, constant predictor.

    The axis spans the results: a constant predictor that lies elsewhere is named in the legend.
    """
    if not any(cell.main for cell in cells):
        return message("No run has finished yet")
    heads = list(dict.fromkeys(cell.head for cell in cells))
    placed = place(cells)
    lowest = max(y for _, y in placed)
    figure = Figure(figsize=(8, 1.4 + 0.28 * lowest), layout="constrained")
    axes = figure.subplots()
    for cell, y in placed:
        draw_cell(axes, cell, measure, y, COLOURS[heads.index(cell.head) % len(COLOURS)])
    low, high = axes.get_xlim()
    constants = []
    for cell, y in placed:
        for name, by_column in constant_lines([cell], measure):
            if name.startswith("Constant"):
                constants.append(by_column[cell.column])
                axes.vlines(constants[-1], y - 0.5, y + 0.5, colors="#666666", linestyles="--", lw=1.2)
    margin = (high - low) / 2
    if any(not low - margin < value < high + margin for value in constants):
        axes.set_xlim(low, high)
    shown = axes.get_xlim()
    far = sorted({f"{value:.3f}" for value in constants if not shown[0] <= value <= shown[1]})
    lines = {line: [y for cell, y in placed if cell.line == line] for line in dict.fromkeys(c.line for c in cells)}
    axes.set_yticks([float(np.mean(own)) for own in lines.values()], [wrapped(line, 32) for line in lines])
    axes.set_ylim(lowest + 0.8, -0.8)
    axes.set_xlabel(f"{measure.metric} on {measure.test_set}, {measure.selection} epoch")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(handles=metric_legend(cells, far), loc="outside right upper")
    return figure


def place(cells: Sequence[Cell]) -> list[tuple[Cell, float]]:
    """Cells by line, each with its height: 1 apart, with a gap between lines."""
    placed: list[tuple[Cell, float]] = []
    for k, line in enumerate(dict.fromkeys(cell.line for cell in cells)):
        for cell in (cell for cell in cells if cell.line == line):
            placed.append((cell, len(placed) + 0.6 * k))
    return placed


def is_comparable(cell: Cell) -> bool:
    return bool(cell.published) and not (cell.published or {}).get("not_comparable")


def draw_cell(axes: Axes, cell: Cell, measure: Measure, y: float, colour: str) -> None:
    if cell.published and is_comparable(cell):
        axes.plot(cell.published["value"], y, "D", color="white", mec="black", ms=6, zorder=4)
    if cell.main is None:
        text = "undefined" if cell.finished else "failed"
        axes.text(0.01, y, text, transform=axes.get_yaxis_transform(), va="center", size=9, color=colour)
        return
    seeds = [value for seed in cell.draws if (value := cell.value(seed, measure)) is not None]
    axes.plot(seeds, [y + 0.27] * len(seeds), "o", color=colour, alpha=0.55, ms=3.5, mew=0)
    if cell.main.low is not None and cell.main.high is not None:
        axes.plot([cell.main.low, cell.main.high], [y, y], color=colour, lw=2, solid_capstyle="butt")
    axes.plot(cell.main.value, y, "o", color=colour, ms=7, mec="white", mew=0.8, zorder=3)


def metric_legend(cells: Sequence[Cell], far: Sequence[str]) -> list[Line2D]:
    """Handles; `far` : the constant predictor's values, where the axis does not show them."""
    handles = [
        Line2D([], [], color=COLOURS[k % len(COLOURS)], marker="o", lw=2, label=head or "mean, 95 % interval")
        for k, head in enumerate(dict.fromkeys(cell.head for cell in cells))
    ]
    handles.append(Line2D([], [], color="#444444", marker="o", ms=3.5, lw=0, alpha=0.6, label="one seed"))
    off = f":\n{', '.join(far)}, off the axis" if far else ""
    handles.append(Line2D([], [], color="#666666", ls="--", label=f"constant predictor{off}"))
    if any(map(is_comparable, cells)):
        handles.append(Line2D([], [], color="white", mec="black", marker="D", lw=0, label="published"))
    return handles


def panels(count: int, side: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` square panels of `side` inches, at most four in a line."""
    wide = min(count, 4)
    high = math.ceil(count / wide)
    figure = Figure(figsize=(wide * side + 0.8, high * (side + 0.5)), layout="constrained")
    axes = figure.subplots(high, wide, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def draw_matrix(axes: Axes, shares: np.ndarray, texts: list[list[str]], names: Sequence[str], title: str) -> Any:
    """One matrix of shares, NaN rows left blank, with a text in each field."""
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    size = max(4.5, min(9.0, 46 / len(names)))
    for i, j in np.ndindex(*shares.shape):
        dark = shares[i, j] > 0.55
        axes.text(j, i, texts[i][j], ha="center", va="center", size=size, color="white" if dark else "black")
    axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0, size=max(size, 7))
    axes.set_yticks(range(len(names)), names, size=max(size, 7))
    axes.tick_params(length=0)
    axes.spines[:].set(visible=True, color="#bbbbbb", linewidth=0.6)
    axes.set_title(title)
    return image


def panel_side(n_classes: int) -> float:
    return min(5.0, max(2.4, 0.42 * n_classes))


@mpl.rc_context(STYLE)
def confusion_figure(cells: Sequence[Cell], measure: Measure) -> Figure:
    """Row-normalised confusion matrices with the counts of all seeds together, one panel a cell, at most 12."""
    shown = [cell for cell in cells if any(run.score(measure.selection, measure.test_set) for run in cell.finished)]
    if not shown:
        return message("No run has finished yet")
    first = shown[0].finished[0].score(measure.selection, measure.test_set)
    figure, axes = panels(min(len(shown), MOST_PANELS), panel_side(len(first["per_class"])))
    for ax, cell in zip(axes, shown, strict=False):
        scores = [run.score(measure.selection, measure.test_set) for run in cell.finished]
        counts = np.sum([score["confusion"] for score in scores if score], axis=0)
        texts = [[f"{count}" if count else "" for count in row] for row in counts]
        names = list(scores[0]["per_class"])
        image = draw_matrix(ax, row_shares(counts), texts, names, wrapped(cell.name, 30))
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true class")
    figure.supxlabel("predicted class")
    figure.supylabel("true class")
    if len(shown) > MOST_PANELS:
        figure.suptitle(f"first {MOST_PANELS} of {len(shown)} cells")
    return figure


def row_shares(counts: np.ndarray) -> np.ndarray:
    """Rows divided by their sums; NaN where a row is empty."""
    totals = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)


@mpl.rc_context(STYLE)
def noise_figure(runs: Sequence[Run]) -> Figure:
    """Transition matrix of the training labels, one panel for each noise, pooled over its seeds."""
    pooled: dict[tuple[str, str, str], dict[str, Any]] = {}
    for run in runs:
        found = run.read("noise", "transition.json")
        if found.get("train", {}).get("counts"):
            files = pooled.setdefault((run["noise"], run["dataset"], run["split"]), {})
            files[run["keys"]["noise"]] = found
    if not pooled:
        return message("No labels have been made yet")
    shown = list(pooled.items())[:MOST_PANELS]
    n_classes = len(next(iter(shown[0][1].values()))["classes"])
    figure, axes = panels(len(shown), panel_side(n_classes))
    several = len({key[1:] for key in pooled}) > 1
    for ax, ((noise, dataset, split), files) in zip(axes, shown, strict=True):
        counts = np.sum([found["train"]["counts"] for found in files.values()], axis=0, dtype=float)
        shares = row_shares(counts)
        rate = 1 - np.trace(counts) / max(counts.sum(), 1)
        texts = [["" if np.isnan(v) or v < 0.005 else f"{v:.2f}".lstrip("0") for v in row] for row in shares]
        title = f"{noise}{f' ({dataset}, {split})' if several else ''}: {100 * rate:.1f} % flipped"
        image = draw_matrix(ax, shares, texts, next(iter(files.values()))["classes"], wrapped(title, 30))
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true class")
    figure.supxlabel("label after noise")
    figure.supylabel("true class")
    return figure


@mpl.rc_context(STYLE)
def weights_figure(cells: Sequence[Cell]) -> Figure:
    """Weights and trusts at the last epoch, of clean and of flipped images, a panel for each; all seeds together.

    AUROC : of low values for flipped labels; 0.5 is chance.
    """
    shown = []
    for cell in cells:
        tables = [table for run in cell.runs if len(table := run.weights())]
        for name in ("weight", "trust"):
            last = [table[table["epoch"] == table["epoch"].max()].dropna(subset=[name]) for table in tables]
            if any(map(len, last)):
                pooled = np.concatenate([table[[name, "is_flipped"]].to_numpy(dtype=float) for table in last])
                shown.append((f"{cell.name}: {name}", pooled))
    if not shown:
        return message("No method here weights its images")
    shown = shown[: 2 * MOST_PANELS]
    figure, axes = panels(len(shown), 3.0)
    for ax, (title, values) in zip(axes, shown, strict=True):
        edges = np.linspace(values[:, 0].min(), max(np.quantile(values[:, 0], 0.99), values[:, 0].min() + 1e-9), 31)
        flipped = values[:, 1] == 1
        if 0 < flipped.sum() < len(flipped):
            title += f", AUROC {auroc(-values[:, 0], flipped, np.ones((1, len(values))))[0]:.2f}"
        for is_flipped, label in ((0, "label kept"), (1, "label flipped")):
            part = np.clip(values[values[:, 1] == is_flipped, 0], None, edges[-1])  # the last bar: all above, too
            if len(part):
                style: Any = {"histtype": "step", "color": COLOURS[is_flipped], "label": label, "lw": 1.5}
                ax.hist(part, edges.tolist(), weights=np.full(len(part), 1 / len(part)), **style)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_title(wrapped(title, 32))
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper right", ncols=2)
    figure.supylabel("share of the images")
    return figure
