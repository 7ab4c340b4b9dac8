"""Stage panels: what the networks of the worst and the best setting of masks look at, side by side.

Judged by the table's metric, mean over seeds; drawn for the first seed. A rule of its own, since it needs the networks.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from medmask.config.base import Block, Int
from medmask.errors import MedmaskError
from medmask.evaluation.cells import Cell, Measure, make_cells
from medmask.evaluation.collect import read_runs

if TYPE_CHECKING:
    from medmask.saliency.settings_figure import Setting


class Panels(Block):
    """How networks are compared."""

    n: Int = Field(4, ge=1, description="training images, in turn from each class, with and without cue")
    seed: Int = Field(0, description="names the drawing of the images")


CONFIG = Panels
INPUTS: tuple[str, ...] = ("runs",)
OPTIONAL: tuple[str, ...] = ()
OUTPUTS: tuple[str, ...] = ("panels",)
MOST_COLUMNS = 3
CONTROLS = ("random", "cutout")
NETWORKS = {"last": "model.safetensors", "best": "best.safetensors"}
log = logging.getLogger(__name__)


def run(cfg: Panels, *, runs: Path, panels: Path) -> None:
    from medmask.evaluation.figures import message, wrapped
    from medmask.saliency.settings_figure import draw_settings

    content, found = read_runs(runs)
    shape = content["settings"]["table"]
    measure = Measure(shape["metric"], shape["test_set"], shape["selection"])
    chosen = worst_and_best(make_cells(found, shape["columns"]), measure)
    try:
        columns = [[read_setting(cfg, word, cell, measure) for word, cell in row] for row in chosen[:MOST_COLUMNS]]
        figure = draw_settings(columns) if columns else message("No finetuning on masked images has finished yet")
        if len(chosen) > MOST_COLUMNS:
            figure.supxlabel(f"first {MOST_COLUMNS} of {len(chosen)} columns of the table", size=10)
    except (MedmaskError, ValidationError) as error:  # a network that is gone must not keep a table from being written
        log.warning("no panels: %s", error)
        figure = message(wrapped(f"No panels: {error}", 60))
    figure.savefig(panels, format="png", dpi=150)


def worst_and_best(cells: Sequence[Cell], measure: Measure) -> list[list[tuple[str, Cell]]]:
    """For each column of the table `worst` and `best` among its finetunings on masked images, or the `only` one.

    Masks and squares at a random place are controls: they count where there is nothing else.
    """
    chosen = []
    for head in dict.fromkeys(cell.head for cell in cells):
        means = {cell: cell.mean(measure) for cell in cells if cell.head == head and rule_of(cell)}
        known = [cell for cell, mean in means.items() if mean is not None]
        searched = [cell for cell in known if rule_of(cell)["kind"] not in CONTROLS] or known
        ranked = sorted(searched, key=lambda cell: means[cell] or 0.0)
        if measure.metric == "ece":  # the one metric of which less is better
            ranked.reverse()
        if ranked:
            chosen.append([("worst", ranked[0]), ("best", ranked[-1])] if len(ranked) > 1 else [("only", ranked[0])])
    return chosen


def rule_of(cell: Cell) -> dict[str, object]:
    """The rule of a cell's masks; empty without."""
    return cell.runs[0].settings.get("finetune", {}).get("mask_rule") or {}


def read_setting(cfg: Panels, word: str, cell: Cell, measure: Measure) -> "Setting":
    """What the first finished seed of a cell has to show."""
    from medmask.saliency.looks import choose_rows, compare, read_training, refuse_missing
    from medmask.saliency.settings_figure import Setting

    first = cell.finished[0]
    folder = first.path("finetune", ".")
    assert folder is not None
    trained = read_training(folder, first.results.parent)
    before, after = trained.before or trained.model, trained.folder / NETWORKS[measure.selection]
    refuse_missing(before, after)
    rows = choose_rows(trained.rows(("train",)), cfg.n, cfg.seed)
    look = compare(trained, before, after, rows, trained.explained, with_masks=True)
    value = f"{measure.metric} on {measure.test_set} {cell.mean(measure):.3f} (mean of {len(cell.finished)})"
    title = f"{word}: {cell.name}\n{value}; here seed {first['seed']}"
    return Setting(title, look, accuracies(first.metrics[measure.selection] if first.metrics else {}))


def accuracies(scores: dict[str, dict]) -> dict[str, dict[str | None, float | None]]:
    """Share of each class's images, and under None of all, that are classified rightly, by test set."""
    return {
        name: {
            **{label: numbers.get("recall") for label, numbers in score["per_class"].items()},
            None: score["metrics"]["accuracy"]["value"],
        }
        for name, score in scores.items()
    }
