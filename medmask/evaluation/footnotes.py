"""The sentences under a table: what its numbers rest on."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from medmask.evaluation.cells import Cell, Measure
from medmask.evaluation.collect import Run
from medmask.evaluation.coverage import coverage_notes
from medmask.evaluation.groups import group_notes
from medmask.evaluation.learnt import learnt_notes
from medmask.evaluation.statistics import rank_correlation

TRAINED = ("pretrain", "audit", "finetune")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
MOST_NAMED = 4  # in one footnote
FEWEST_RANKS = 5  # rows whose order is compared with the published one


def footnotes(settings: dict[str, Any], cells: Sequence[Cell], measure: Measure, draws: int) -> list[str]:
    """All footnotes, each a sentence or two, in the order of reading."""
    runs = [run for cell in cells for run in cell.runs]
    finished = [run for run in runs if run.finished]
    notes = [progress(runs, finished)]
    if not finished:
        notes.append("Nothing has finished yet, so there are no numbers.")
    notes += unique(test_set_note(run, measure) for run in finished)
    notes += unique(note for run in finished for note in split_notes(run))
    notes += unique(f"{run['dataset']}: {note}" for run in finished for note in (run.metrics or {}).get("notes", []))
    notes += training_notes([cell for cell in cells if cell.finished])
    notes.append(seed_note(settings, cells))
    notes += selection_notes(cells, measure)
    notes.append(
        f"Brackets: 95 % interval from {draws} bootstrap draws over seeds and groups of test images together "
        "(groups alone where one seed has finished). ± is the standard deviation over seeds."
    )
    if 1 < len(settings["seeds"]) < 5:
        notes.append("With fewer than five seeds the bootstrap understates how much seeds vary: read intervals so.")
    if any(cell.difference for cell in cells):
        notes.append(
            f"Differences to {settings['reference']} are paired: the same seeds and the same draws of groups on both "
            "sides. p is two-sided and corrected after Holm over all comparisons of this table."
        )
    if any(cell.published for cell in cells):
        notes.append(
            "A published number is inside when it lies in the 95 % prediction interval of one more run (spread over "
            "seeds, and the binomial error of the published number of test images, approximate unless accuracy)."
        )
    notes += rank_notes(cells, measure) + group_notes(cells, measure) + coverage_notes(cells, measure)
    notes += learnt_notes(cells)
    return notes + failure_notes(cells)


def unique(items: Iterable[str]) -> list[str]:
    return [item for item in dict.fromkeys(items) if item]


def progress(runs: Sequence[Run], finished: Sequence[Run]) -> str:
    return f"{len(finished)} of {len(runs)} planned runs have finished."


def test_set_note(run: Run, measure: Measure) -> str:
    """Size of the test set, and the classes that the averages run over."""
    score = run.score(measure.selection, measure.test_set)
    if not score:
        return ""
    classes, absent = len(score["per_class"]), score["absent"]
    averaged = f"macro averages, AUROC too, run over {classes - len(absent)} of {classes} classes"
    missing = f" (no test image of {', '.join(absent)})" if absent else ""
    counts = ", ".join(f"{name} {numbers['n']}" for name, numbers in score["per_class"].items())
    return (
        f"Test set {measure.test_set} of {run['dataset']}, split {run['split']}: {score['n']} images in "
        f"{score['n_groups']} groups; {averaged}{missing}. Images by class: {counts}."
    )


test_set_note.__test__ = False  # type: ignore[attr-defined]


def split_notes(run: Run) -> list[str]:
    """Notes of the split, and its groups that stand on two sides."""
    summary = run.read("split", "split.json")
    where = f"{run['dataset']}, split {run['split']}: "
    notes = [where + note for note in summary.get("notes", [])]
    crossing = summary.get("crossing") or {}
    if crossing.get("kept") and crossing.get("images") and not notes:
        notes.append(f"{where}{crossing['images']} test images share one of {crossing['groups']} groups with training.")
    return notes


def training_notes(cells: Sequence[Cell]) -> list[str]:
    """What the trainings had to say about themselves, each once, after the names of the cells that it is said of."""
    named: dict[str, list[str]] = {}
    for cell in cells:
        records = [run.read(stage, "record.json") for stage in TRAINED for run in cell.finished]
        for note in merged(note for record in records for note in record.get("notes", [])):
            named.setdefault(note, []).append(cell.name)
    return [f"{who(names, len(cells))}: {note}" for note, names in named.items()]


def who(names: Sequence[str], n: int) -> str:
    """Some of `n` cells, by name where they are few."""
    if len(names) > MOST_NAMED:
        return "All rows" if len(names) == n else f"{len(names)} of {n} rows"
    return "; ".join(names)


def merged(notes: Iterable[str]) -> list[str]:
    """Notes that differ in their numbers alone as one, with the least and the largest of each."""
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for note in notes:
        alike.setdefault(tuple(NUMBER.split(note)), []).append(NUMBER.findall(note))
    found = []
    for words, numbers in alike.items():
        spans = [sorted(set(values), key=float) for values in zip(*numbers, strict=True)]
        texts = [span[0] if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans]
        found.append(words[0] + "".join(text + word for text, word in zip(texts, words[1:], strict=True)))
    return found


def seed_note(settings: dict[str, Any], cells: Sequence[Cell]) -> str:
    """What the seeds vary: the stages that follow them and of which a cell has several artifacts."""
    seeds = settings["seeds"]
    if len(seeds) == 1:
        return f"One seed ({seeds[0]}): intervals and p hold for these networks, not for the methods."
    several = [s for s in settings["seed_stages"] if any(len({r["keys"].get(s) for r in c.runs}) > 1 for c in cells)]
    varied = ", ".join(several) or "no stage"
    return f"The {len(seeds)} seeds ({', '.join(map(str, seeds))}) vary: {varied}. All share the split."


def selection_notes(cells: Sequence[Cell], measure: Measure) -> list[str]:
    """Which epoch is shown, by what the best one was chosen, and on labels of what quality."""
    shown = "the last epoch" if measure.selection == "last" else "the epoch that was best on validation"
    rules: dict[str, list[str]] = {}
    for cell in cells:
        run = cell.runs[0]
        training = run.settings.get("finetune") or run.settings.get("pretrain") or {}
        if "select" not in training:
            continue
        quality = "noisy" if run.has_noisy_validation(training) else "clean"
        rule = f"{training['select']} on {quality} validation labels"
        if run.read("split", "split.json").get("sides", {}).get("val", {}).get("n") == 0:
            rule = "nothing, since there are no validation images"
        rules.setdefault(rule, []).append(cell.name)
    n = sum(map(len, rules.values()))
    named = [rule if len(rules) == 1 else f"{rule} ({who(names, n)})" for rule, names in rules.items()]
    best = f" The best epoch was chosen by {'; '.join(named)}." if named else ""
    return [f"Shown: {shown}.{best} No epoch was chosen on the test set."]


def rank_notes(cells: Sequence[Cell], measure: Measure) -> list[str]:
    """For each column of the table: do its rows stand in the published order?"""
    heads = dict.fromkeys(cell.head for cell in cells)
    return unique(rank_note([cell for cell in cells if cell.head == head], measure) for head in heads)


def rank_note(cells: Sequence[Cell], measure: Measure) -> str:
    """Spearman's correlation of our means with the published values, and that of each seed; empty for few rows."""
    known = [(cell, cell.published) for cell in cells if cell.published]
    pairs = [
        (cell, cell.main.value, published["value"])
        for cell, published in known
        if cell.main and not published.get("not_comparable")
    ]
    if len(pairs) < FEWEST_RANKS:
        return ""
    ranked, means, values = zip(*pairs, strict=True)
    where = f" in column {cells[0].head}" if cells[0].head else ""
    what = f"Order of the rows{where} on test set {measure.test_set}: Spearman's rank correlation"
    rho = rank_correlation(means, values)
    if rho is None:
        return f"{what} is not defined, since all our means or all published values are the same."
    seeds = [seed for seed in ranked[0].draws if all(seed in cell.draws for cell in ranked)]
    each = {seed: rank_correlation([cell.value(seed, measure) or 0.0 for cell in ranked], values) for seed in seeds}
    single = ", ".join(f"seed {seed}: {'undefined' if r is None else f'{r:.3f}'}" for seed, r in each.items())
    return (
        f"{what} of our means with the published values is {rho:.3f} over {len(pairs)} of {len(known)} rows that have "
        f"one{f' ({single})' if len(seeds) > 1 else ''}. The published values stand as they are: what another run of "
        "theirs would give is not known, so there is no interval."
    )


def failure_notes(cells: Sequence[Cell]) -> list[str]:
    """One note a cell with runs that have not finished, or whose metric is undefined."""
    notes = []
    for cell in cells:
        seeds_by_reason: dict[str, list[str]] = {}
        for seed, reason in cell.reasons.items():
            seeds_by_reason.setdefault(reason, []).append(str(seed))
        for reason, seeds in seeds_by_reason.items():
            notes.append(f"Failed: {cell.name}, {len(seeds)} of {len(cell.runs)} (seed {', '.join(seeds)}): {reason}")
        if cell.why:
            notes.append(f"Undefined: {cell.name}: {cell.why}.")
    return notes
