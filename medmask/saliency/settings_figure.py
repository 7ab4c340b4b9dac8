"""Figure of two settings of masks side by side: what the networks look at, and how right they are by class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medmask.saliency.panels import Look, draw_look

MOST_CLASSES = 10
MOST_BARS = 24  # with more there is no room for numbers


@dataclass(frozen=True)
class Setting:
    """A setting of masks. accuracy : of each class and, under None, of all images, by test set; None where none is."""

    title: str
    look: Look
    accuracy: dict[str, dict[str | None, float | None]]


def draw_settings(columns: Sequence[Sequence[Setting]]) -> Any:
    """A matplotlib figure: settings of a column of the table side by side, columns below each other."""
    from matplotlib.figure import Figure

    from medmask.evaluation.figures import STYLE, mpl

    with mpl.rc_context(STYLE):
        n, wide = max(len(s.look.images) for row in columns for s in row), max(map(len, columns))
        figure = Figure(figsize=(6.9 * wide, (1.36 * n + 2.5) * len(columns)), layout="constrained")
        blocks = figure.subfigures(len(columns), wide, squeeze=False, wspace=0.03)
        for row, settings in zip(blocks, columns, strict=True):
            for block, setting in zip(row, settings, strict=False):
                panels, bars = block.subfigures(2, 1, height_ratios=[1.36 * n + 0.5, 2])
                block.suptitle(setting.title, fontsize=11)
                grid = panels.subplots(len(setting.look.images), len(setting.look.titles), squeeze=False)
                draw_look(grid, setting.look)
                draw_accuracy(bars.subplots(), setting.accuracy)
    return figure


def draw_accuracy(axes: Any, accuracy: dict[str, dict[str | None, float | None]]) -> None:
    """A bar a class, a line over them for all images, test sets beside each other."""
    from medmask.evaluation.class_figure import HATCHES
    from medmask.evaluation.figures import COLOURS

    classes = list(dict.fromkeys(name for found in accuracy.values() for name in found if name is not None))
    if len(classes) > MOST_CLASSES:
        axes.text(0.5, 0.5, f"{len(classes)} classes are too many for bars", ha="center", va="center")
        axes.set_axis_off()
        return
    step, numbered = 0.8 / len(classes), len(classes) * len(accuracy) <= MOST_BARS
    for x, found in enumerate(accuracy.values()):
        mean = found.get(None)
        for k, name in enumerate(classes):
            value = found.get(name)
            if value is not None:
                place = x + (k - (len(classes) - 1) / 2) * step
                look = {"facecolor": COLOURS[k % len(COLOURS)], "hatch": HATCHES[k // len(COLOURS)]}
                axes.bar(place, value, 0.9 * step, edgecolor="white", lw=0, label=f"class {name}", **look)
                if numbered:
                    top = mean if mean is not None and -0.01 < mean - value < 0.12 else value  # clear of the line
                    axes.text(place, top + 0.02, f"{value:.2f}", ha="center", va="bottom", size=8)
        if mean is not None:
            axes.plot([x - 0.42, x + 0.42], [mean, mean], color="black", lw=1.5, label="all images")
            axes.text(x + 0.43, mean, f"{mean:.2f}", ha="left", va="center", size=8)
    axes.set_xticks(range(len(accuracy)), list(accuracy), size=9)
    axes.set(ylim=(0, 1.15), xlim=(-0.6, len(accuracy) - 0.35), ylabel="accuracy")
    axes.set_yticks(np.linspace(0, 1, 5))
    legend = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = sorted(legend, key=lambda name: name == "all images")
    axes.legend([legend[name] for name in names], names, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
