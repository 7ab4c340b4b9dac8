"""The files of an experiment in numbers: summary.csv, runs.csv, table.csv, and the table in the paper's shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medmask import io
from medmask.evaluation.cells import Cell, Measure, find_published
from medmask.evaluation.collect import FIELDS, Run
from medmask.evaluation.statistics import Estimate

SUMMARY_COLUMNS = (
    "experiment", "run", "dataset", "split", "noise", "pretrain", "finetune", "seed", "test_set", "metric", "value",
    "ci_low", "ci_high", "n", "n_groups", "selection", "published", "published_source",
)  # fmt: skip
TABLE_COLUMNS = (
    "line", "column", "run", *FIELDS, "set", "test_set", "metric", "selection", "mean", "sd", "ci_low", "ci_high",
    "n_finished", "n_planned", "n", "n_groups", "compared_with", "difference", "difference_low", "difference_high",
    "p_value", "p_holm", "last", "best", "epochs", "images_seen", "parameters", "hours", "device", "trusted_labels",
    "published", "published_source", "verdict", "failed",
)  # fmt: skip
RUN_FIELDS = ("run", "row", "label", *FIELDS, "set", "seed", "status", "reason")
CONSTANTS = {"majority": "Constant predictor", "stratified": "Stratified guess"}
DASH = "\u2013"


def summary_rows(experiment: str, runs: Sequence[Run], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a finished run, test set, metric asked for, and epoch chosen; empty where a metric is undefined."""
    rows = []
    for run in runs:
        metrics = run.plan.get("metrics") or settings.get("metrics") or []
        scores = [(s, t, score) for s in ("last", "best") for t, score in (run.metrics or {s: {}})[s].items()]
        for selection, test_set, score in scores:
            for metric in metrics:
                number = score["metrics"].get(metric, {})
                published = find_published(run.fields, run["row"], settings["published"], metric, test_set) or {}
                rows.append(
                    {
                        **{name: run[name] for name in ("run", "dataset", "split", "noise", "pretrain", "finetune")},
                        **{"experiment": experiment, "seed": run["seed"], "test_set": test_set, "metric": metric},
                        **{"value": number.get("value"), "ci_low": number.get("low"), "ci_high": number.get("high")},
                        **{"n": score["n"], "n_groups": score["n_groups"], "selection": selection},
                        "published": published.get("value"),
                        "published_source": published.get("source"),
                    }
                )
    return rows


def run_rows(runs: Sequence[Run]) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows of runs.csv: what each run is, the key of each stage, and its settings as JSON."""
    stages = list(dict.fromkeys(stage for run in runs for stage in (*run["keys"], *run["settings"])))
    rows = []
    for run in runs:
        row: dict[str, Any] = {name: run[name] for name in RUN_FIELDS if name in run.plan}
        row |= {"set": io.to_json(run["set"]), "status": "finished" if run.finished else "failed", "reason": run.reason}
        row |= {f"key_{stage}": run["keys"].get(stage) for stage in stages}
        row |= {f"settings_{s}": io.to_json(run.settings[s]) if s in run.settings else None for s in stages}
        rows.append(row)
    return [*RUN_FIELDS, *(f"{kind}_{stage}" for kind in ("key", "settings") for stage in stages)], rows


def cost(run: Run) -> dict[str, Any]:
    """What a run took: sums over its trainings, those that judged labels for it included; the network's parameters."""
    records = run.records()
    return {
        "epochs": sum(record.get("epochs") or 0 for record in records),
        "images_seen": sum(record.get("images_seen") or 0 for record in records),
        "parameters": records[-1].get("parameters") if records else None,
        "hours": sum((record.get("seconds") or 0) * (record.get("ranks") or 1) for record in records) / 3600,
        "device": "+".join(dict.fromkeys(str(record["device"]) for record in records if record.get("device"))),
        "trusted_labels": trusted_labels(run),
    }


def trusted_labels(run: Run) -> int:
    """True labels that a run has used: of its trusted images, of all others for the upper bound, and of validation.

    The last count where training labels are flipped, since other true labels cost nothing.
    """
    split = run.read("split", "split.json")
    sizes = {side: facts.get("n", 0) for side, facts in split.get("sides", {}).items()}
    n_meta = sizes.get("meta_set", 0) + sum(split.get("shared_meta_set", {}).values())
    used = 0
    for stage in ("pretrain", "finetune"):
        settings = run.settings.get(stage, {})
        found = n_meta if "meta_set" in settings.get("train_on", ()) else 0
        meta = settings.get("meta")
        if meta is not None:
            times = settings.get("ranks", 1) if meta["scope"] == "rank" else 1
            once = min(n_meta, (meta["size"] or n_meta) * times)
            found = max(found, once if meta["refresh"] == "once" else n_meta)
        found += sizes.get("train", 0) if settings.get("method") == "upper_bound" else 0
        found += sizes.get("val", 0) if settings and run.has_flips and not run.has_noisy_validation(settings) else 0
        used = max(used, found)
    return used


def mean_cost(cell: Cell) -> dict[str, Any]:
    """Costs of one run of a cell: the mean over its finished seeds."""
    costs = [cost(run) for run in cell.finished]
    if not costs:
        return {}
    known = {name: [each[name] for each in costs if each[name] is not None] for name in costs[0]}
    numbers = {name: float(np.mean(values)) for name, values in known.items() if values and name != "device"}
    return {**numbers, "device": costs[0]["device"]}


def table_rows(cells: Sequence[Cell], measure: Measure) -> list[dict[str, Any]]:
    """Rows of table.csv, the long form: first the predictors that do not look, then one row a cell."""
    last, best = (Measure(measure.metric, measure.test_set, selection) for selection in ("last", "best"))
    shared = {"test_set": measure.test_set, "metric": measure.metric, "selection": measure.selection}
    rows: list[dict[str, Any]] = []
    for line, by_column in constant_lines(cells, measure):
        rows += [{**shared, "line": line, "column": column, "mean": value} for column, value in by_column.items()]
    for cell in cells:
        score = cell.finished[0].score(measure.selection, measure.test_set) if cell.finished else {}
        failed = [f"seed {seed}: {reason}" for seed, reason in cell.reasons.items()]
        published = cell.published or {}
        rows.append(
            {
                **shared,
                **{name: cell.runs[0][name] for name in ("run", *FIELDS)},
                **{"line": cell.line, "column": cell.column, "set": io.to_json(cell.runs[0]["set"])},
                **estimate_columns(cell.main, "mean", "ci_"),
                **{"sd": cell.main.sd if cell.main else None, "last": cell.mean(last), "best": cell.mean(best)},
                **{"n_finished": len(cell.finished), "n_planned": len(cell.runs)},
                **{"n": score.get("n"), "n_groups": score.get("n_groups"), "compared_with": cell.compared_with},
                **estimate_columns(cell.difference, "difference", "difference_"),
                **{"p_value": cell.difference.p_value if cell.difference else None, "p_holm": cell.holm_p},
                **mean_cost(cell),
                **{"published": published.get("value"), "published_source": published.get("source")},
                **{"verdict": cell.verdict, "failed": "; ".join(failed)},
            }
        )
    return rows


def estimate_columns(found: Estimate | None, name: str, prefix: str) -> dict[str, Any]:
    return {name: found.value, f"{prefix}low": found.low, f"{prefix}high": found.high} if found else {}


def constant_lines(cells: Sequence[Cell], measure: Measure) -> list[tuple[str, dict[str, float]]]:
    """Lines of the constant predictor and the stratified guess by column: a pair for each set of test images."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    where = {cell.judged_on: f" ({cell.fields['dataset']}, {cell.fields['split']})" for cell in cells}
    for cell in cells:
        for run in cell.finished:
            constants = (run.metrics or {})["constants"].get(measure.test_set, {})
            for kind in CONSTANTS:
                value = constants.get(kind, {}).get(measure.metric)
                if value is not None:
                    found.setdefault((cell.judged_on, kind), {})[cell.column] = value
    several = len({images for images, _ in found}) > 1
    return [(CONSTANTS[kind] + (where[images] if several else ""), by) for (images, kind), by in found.items()]


@dataclass(frozen=True)
class Grid:
    """A table of texts with a caption."""

    caption: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Document:
    """What table.md, table.tex and table.html show."""

    title: str
    intro: str
    grids: list[Grid]
    notes: list[str]


def make_document(
    title: str, cells: Sequence[Cell], measure: Measure, notes: list[str], *, decimals: int, more: Sequence[Grid] = ()
) -> Document:
    """The table in the paper's shape, and beside it comparisons, `more` and costs, cell by cell."""
    epoch = "last epoch" if measure.selection == "last" else "best epoch on validation"
    intro = f"{measure.metric} on test set {measure.test_set}, {epoch}: mean ± sd over seeds [95 % interval]"
    grids = [paper_grid(cells, measure, decimals)]
    if any(cell.compared_with or cell.published for cell in cells):
        grids.append(comparison_grid(cells, measure, decimals))
    grids += more
    if any(cell.finished for cell in cells):
        grids.append(cost_grid(cells))
    return Document(title, intro, grids, notes)


def paper_grid(cells: Sequence[Cell], measure: Measure, decimals: int) -> Grid:
    heads = {cell.column: cell.head or measure.metric for cell in cells}
    rows = [
        [line, *(number(by_column.get(head), decimals) for head in heads)]
        for line, by_column in constant_lines(cells, measure)
    ]
    for line in dict.fromkeys(cell.line for cell in cells):
        by_head = {cell.column: cell for cell in cells if cell.line == line}
        rows.append([line, *(cell_text(by_head[head], decimals) if head in by_head else DASH for head in heads)])
    return Grid("Result", ["", *heads.values()], rows)


def comparison_grid(cells: Sequence[Cell], measure: Measure, decimals: int) -> Grid:
    last, best = (Measure(measure.metric, measure.test_set, selection) for selection in ("last", "best"))
    header = ["", "runs", "compared with", "difference", "p (Holm)", "last", "best", "published", "verdict"]
    rows = []
    for cell in cells:
        published = cell.published or {}
        found = cell.difference
        rows.append(
            [
                cell.name,
                f"{len(cell.finished)} of {len(cell.runs)}",
                cell.compared_with or DASH,
                f"{found.value:+.{decimals}f}{bounds(found, decimals, '+')}" if found else DASH,
                DASH if cell.holm_p is None else f"{cell.holm_p:.3f}",
                number(cell.mean(last), decimals),
                number(cell.mean(best), decimals),
                number(published.get("value"), decimals),
                cell.verdict,
            ]
        )
    return Grid("Comparison", header, rows)


def duration(hours: float) -> str:
    """Hours, or minutes where there are few."""
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def cost_grid(cells: Sequence[Cell]) -> Grid:
    header = ["", "epochs", "images seen", "parameters", "process time", "device", "trusted labels"]
    rows = []
    for cell in cells:
        took = mean_cost(cell)
        counts = [f"{took[name]:,.0f}" if name in took else DASH for name in ("epochs", "images_seen", "parameters")]
        hours = duration(took["hours"]) if "hours" in took else DASH
        trusted = f"{took['trusted_labels']:.0f}" if "trusted_labels" in took else DASH
        rows.append([cell.name, *counts, hours, took.get("device") or DASH, trusted])
    return Grid("Cost of one run, pretraining included", header, rows)


def cell_text(cell: Cell, decimals: int) -> str:
    """`mean ± sd [low, high]`, and how many of the planned runs it rests on when some are missing."""
    partial = f" ({len(cell.finished)} of {len(cell.runs)})" if len(cell.finished) < len(cell.runs) else ""
    if cell.main is None:
        return ("undefined" if cell.finished else "failed") + partial
    spread = "" if cell.main.sd is None else f" ± {cell.main.sd:.{decimals}f}"
    return f"{cell.main.value:.{decimals}f}{spread}{bounds(cell.main, decimals)}{partial}"


def mean_text(values: Sequence[float], decimals: int) -> str:
    """`mean ± sd` over seeds; a dash for none."""
    if not values:
        return DASH
    spread = f" ± {np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{decimals}f}{spread}"


def bounds(found: Estimate, decimals: int, sign: str = "") -> str:
    if found.low is None or found.high is None:
        return ""
    return f" [{found.low:{sign}.{decimals}f}, {found.high:{sign}.{decimals}f}]"


def number(value: float | None, decimals: int) -> str:
    return DASH if value is None else f"{value:.{decimals}f}"
