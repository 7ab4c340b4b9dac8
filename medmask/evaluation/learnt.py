"""What the trainings learnt of wrong labels, in numbers: are flipped images found, mended, or learnt by heart?"""

from collections.abc import Sequence

from medmask.evaluation.cells import Cell
from medmask.evaluation.collect import Run
from medmask.evaluation.tables import Grid, mean_text

COLUMNS = {  # of a finetuning's history, written at the end of each epoch
    "train/auroc_weight": "AUROC of weights",
    "train/auroc_trust": "AUROC of trusts",
    "train/flipped_mended": "flipped: target mended",
    "train/clean_kept": "others: target kept",
    "train/flipped_as_given": "flipped: classified as labelled",
    "train/flipped_as_true": "flipped: classified as they are",
}


def last_number(run: Run, name: str) -> float | None:
    """A number of the finetuning's last epoch; None where its history has none."""
    found = [line[name] for line in run.history("finetune") if line.get(name) is not None]
    return found[-1] if found else None


def learnt_grids(cells: Sequence[Cell], decimals: int) -> list[Grid]:
    """A table with a row for each cell that has trained on flipped labels; none where no cell has."""
    numbers = {
        cell.name: {name: [n for run in cell.finished if (n := last_number(run, name)) is not None] for name in COLUMNS}
        for cell in cells
    }
    shown = [name for name in COLUMNS if any(known[name] for known in numbers.values())]
    rows = [
        [cell, *(mean_text(known[name], decimals) for name in shown)]
        for cell, known in numbers.items()
        if any(known.values())
    ]
    return [Grid("Training images with flipped labels", ["", *(COLUMNS[name] for name in shown)], rows)] if rows else []


def learnt_notes(cells: Sequence[Cell]) -> list[str]:
    """How that table is to be read, by the columns that it has."""
    grids = learnt_grids(cells, 3)
    if not grids:
        return []
    heads = " ".join(grids[0].header)
    methods = {run.settings.get("finetune", {}).get("method") for cell in cells for run in cell.finished}
    sentences = {
        "Training images with flipped labels: at the last epoch, mean ± standard deviation over seeds.": True,
        "AUROC: of low weights or trusts for flipped labels, 0.5 is chance.": "AUROC" in heads,
        "Mended: the target is, or is mostly, the true class.": "mended" in heads,
        "Classified: when last trained on; as labelled means learnt by heart.": "classified" in heads,
        "Errors that confident learning has removed are not counted.": "confident" in methods,
    }
    return [" ".join(sentence for sentence, is_needed in sentences.items() if is_needed)]
