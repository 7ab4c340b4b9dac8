"""Stage aggregate: put the runs of an experiment into tables, figures and the answer to its claim."""

import logging
from pathlib import Path
from typing import Any

from pydantic import Field

from medmask import io
from medmask.config.base import Block, Int
from medmask.evaluation.cells import Measure, compare_cells, judge_published, make_cells, measure_cells
from medmask.evaluation.claim import answer_claim, claim_note, claim_page
from medmask.evaluation.collect import read_runs
from medmask.evaluation.coverage import coverage_grids
from medmask.evaluation.footnotes import footnotes
from medmask.evaluation.groups import group_grids
from medmask.evaluation.learnt import learnt_grids
from medmask.evaluation.render import to_html, to_markdown, to_tex
from medmask.evaluation.tables import SUMMARY_COLUMNS, TABLE_COLUMNS, make_document, run_rows, summary_rows, table_rows


class Aggregation(Block):
    """How runs are put together."""

    draws: Int = Field(2000, ge=100, description="bootstrap draws over seeds and groups")


CONFIG = Aggregation
INPUTS: tuple[str, ...] = ("runs",)
OPTIONAL: tuple[str, ...] = ()
OUTPUTS: tuple[str, ...] = (
    "summary", "table_csv", "table_md", "table_tex", "table_html", "runs_csv",
    "metric_png", "metric_svg", "confusion_png", "confusion_svg", "curves_png", "curves_svg", "noise_png", "noise_svg",
    "weights_png", "weights_svg", "classes_png", "classes_svg",
    "claim",
)  # fmt: skip
OPTIONAL_OUTPUTS: tuple[str, ...] = ("coverage_png", "coverage_svg")
log = logging.getLogger(__name__)


def run(cfg: Aggregation, *, runs: Path, **outputs: Path) -> None:
    """Write all files of OUTPUTS, and of coverages if wanted; runs that have not finished are named in them."""
    from medmask.evaluation import figures
    from medmask.evaluation.class_figure import classes_figure
    from medmask.evaluation.coverage_figure import coverage_figure
    from medmask.evaluation.curves_figure import curves_figure

    content, found = read_runs(runs)
    settings: dict[str, Any] = content["settings"]
    shape = settings["table"]
    measure = Measure(shape["metric"], shape["test_set"], shape["selection"])
    cells = make_cells(found, shape["columns"])
    measure_cells(cells, measure, cfg.draws)
    compare_cells(cells, settings["reference"], measure)
    judge_published(cells, settings["published"], measure)
    for cell in cells:
        for seed, reason in cell.reasons.items():
            log.warning("failed: %s, %s, seed %d: %s", cell.line, cell.runs[0]["noise"], seed, reason)

    summary = summary_rows(content["experiment"], found, settings)
    io.write_csv(outputs["summary"], SUMMARY_COLUMNS, summary)
    io.write_csv(outputs["table_csv"], TABLE_COLUMNS, table_rows(cells, measure))
    answer = answer_claim(settings["claim"], cells, cfg.draws)
    document = make_document(
        settings.get("title") or content["experiment"],
        cells,
        measure,
        claim_note(answer) + footnotes(settings, cells, measure, cfg.draws),
        decimals=shape["decimals"],
        more=[
            *group_grids(cells, measure, shape["decimals"]),
            *coverage_grids(cells, measure, shape["decimals"]),
            *learnt_grids(cells, shape["decimals"]),
        ],
    )
    outputs["table_md"].write_text(to_markdown(document), encoding="utf-8")
    outputs["table_tex"].write_text(to_tex(document), encoding="utf-8")
    outputs["table_html"].write_text(to_html(document), encoding="utf-8")
    io.write_csv(outputs["runs_csv"], *run_rows(found))
    drawn = {
        "metric": figures.metric_figure(cells, measure),
        "confusion": figures.confusion_figure(cells, measure),
        "curves": curves_figure(cells),
        "noise": figures.noise_figure(found),
        "weights": figures.weights_figure(cells),
        "classes": classes_figure(cells, measure.selection),
    }
    if set(OPTIONAL_OUTPUTS) <= outputs.keys():
        drawn["coverage"] = coverage_figure(cells, measure, settings["reference"])
    for name, figure in drawn.items():
        figures.save(figure, outputs[f"{name}_png"], outputs[f"{name}_svg"])
    outputs["claim"].write_text(claim_page(answer), encoding="utf-8")
    done = sum(each.finished for each in found)
    log.info("%s: %d of %d runs finished", content["experiment"], done, len(found))
