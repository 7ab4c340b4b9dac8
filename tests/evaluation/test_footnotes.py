"""Footnotes: what trainings say of themselves is said once."""

from medmask.evaluation.cells import make_cells
from medmask.evaluation.collect import Run, read_runs
from medmask.evaluation.footnotes import merged, training_notes, who
from tests.evaluation.fake_results import make_results


def test_notes_that_differ_in_numbers_are_one():
    notes = [
        "masks (mean 0.7) hide 5.5% of 9 images",
        "no images",
        "masks (mean 0.7) hide 12% of 9 images",
        "no images",
    ]
    assert merged(notes) == ["masks (mean 0.7) hide 5.5 to 12% of 9 images", "no images"]
    assert merged([]) == []


def test_many_rows_are_counted():
    assert who(["a", "b"], 2) == "a; b"
    assert who(list("abcde"), 5) == "All rows"
    assert who(list("abcde"), 6) == "5 of 6 rows"


def test_what_all_rows_say_is_said_of_all(tmp_path, monkeypatch):
    _, runs = read_runs(make_results(tmp_path))
    cells = [cell for cell in make_cells(runs, None) if cell.finished]
    assert len(cells) > 1

    def record(run, stage, name):
        own = [f"lost {run['seed'] + 1} of 9"] if run in cells[0].runs else []
        return {"notes": ["no validation", *own]} if stage == "finetune" else {}

    monkeypatch.setattr(Run, "read", record)
    seeds = [run["seed"] + 1 for run in cells[0].finished]
    assert len(seeds) > 1
    assert training_notes(cells) == [
        "All rows: no validation",
        f"{cells[0].name}: lost {min(seeds)} to {max(seeds)} of 9",
    ]
