"""Figure of the accuracies of each class on each test set, with their average."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from medmask.evaluation.cells import Cell
from medmask.evaluation.figures import COLOURS, STYLE, message, mpl, wrapped

MOST_CLASSES = 10
HATCHES = ("", "///")  # of the classes that the colours do not suffice for


@mpl.rc_context(STYLE)
def classes_figure(cells: Sequence[Cell], selection: str) -> Figure:
    """Bars: share of each class's test images that are classified rightly; line: of all images. Means over seeds."""
    done = [cell for cell in cells if cell.finished]
    scores = [[run.metrics[selection] for run in cell.finished if run.metrics] for cell in done]
    if not done:
        return message("No run has finished yet")
    sets = list(dict.fromkeys(name for runs in scores for found in runs for name in found))
    judged = [found[name] for runs in scores for found in runs for name in found]
    classes = list(dict.fromkeys(label for found in judged for label in found["per_class"]))
    if len(classes) > MOST_CLASSES:
        return message(f"{len(classes)} classes are too many for bars: see the confusion matrices")
    high, step = 0.16 * len(classes) + 0.14, 0.8 / len(classes)
    figure = Figure(figsize=(3 + 2.6 * len(sets), 1.2 + high * len(done)), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(sets), sharey=True, squeeze=False)[0], sets, strict=True):
        for y, runs in enumerate(scores):
            here = [found[name] for found in runs if name in found]
            for k, label in enumerate(classes):
                values = [v for found in here if (v := found["per_class"].get(label, {}).get("recall")) is not None]
                if values:
                    place = y + (k - (len(classes) - 1) / 2) * step
                    look = {"facecolor": COLOURS[k % len(COLOURS)], "hatch": HATCHES[k // len(COLOURS)]}
                    axes.barh(place, np.mean(values), 0.9 * step, edgecolor="white", lw=0, label=label, **look)
            if here:
                mean = float(np.mean([found["metrics"]["accuracy"]["value"] for found in here]))
                axes.plot([mean, mean], [y - 0.45, y + 0.45], color="black", lw=1.5, label="all images")
        axes.set(title=name, xlim=(0, 1), xlabel="accuracy")
    first = figure.axes[0]
    first.set_yticks(range(len(done)), [wrapped(cell.name, 40) for cell in done])
    first.set_ylim(len(done) - 0.5, -0.5)
    legend = dict(zip(*reversed(first.get_legend_handles_labels()), strict=True))
    figure.legend(legend.values(), legend.keys(), loc="outside upper right", ncols=min(6, len(legend)))
    return figure
