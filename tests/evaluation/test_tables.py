import json

import pytest

from medmask.evaluation.cells import Measure, compare_cells, judge_published, make_cells, measure_cells
from medmask.evaluation.collect import Run, read_runs
from medmask.evaluation.render import to_html, to_markdown, to_tex
from medmask.evaluation.tables import (
    SUMMARY_COLUMNS,
    TABLE_COLUMNS,
    Document,
    Grid,
    make_document,
    run_rows,
    summary_rows,
    table_rows,
    trusted_labels,
)
from tests.evaluation.fake_results import make_results

MEASURE = Measure("balanced_accuracy", "test", "last")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    content, runs = read_runs(make_results(tmp_path_factory.mktemp("fake"), n=80, seeds=(0, 1)))
    cells = make_cells(runs, "noise")
    measure_cells(cells, MEASURE, 100)
    compare_cells(cells, "baseline", MEASURE)
    judge_published(cells, content["settings"]["published"], MEASURE)
    return content["settings"], runs, cells


def test_summary_has_a_row_for_each_run_metric_and_epoch(experiment):
    settings, runs, _ = experiment
    rows = summary_rows("noisy", runs, settings)
    assert len(rows) == 19 * 3 * 2  # 20 runs without the failed one, three metrics, last and best
    assert all(set(row) == set(SUMMARY_COLUMNS) for row in rows)
    row = next(r for r in rows if r["run"] == "baseline" and r["noise"] == "sym40" and r["metric"] == MEASURE.metric)
    assert (row["published"], row["published_source"], row["n"]) == (0.55, "README table", 80)
    assert row["ci_low"] < row["value"] < row["ci_high"]
    assert {r["published"] for r in rows if r["metric"] == "accuracy"} == {None}


def test_columns_of_summary_are_those_users_rely_on():
    assert ",".join(SUMMARY_COLUMNS) == (
        "experiment,run,dataset,split,noise,pretrain,finetune,seed,test_set,metric,value,ci_low,ci_high,n,n_groups,"
        "selection,published,published_source"
    )


def test_long_table(experiment):
    _, _, cells = experiment
    rows = table_rows(cells, MEASURE)
    assert all(set(row) <= set(TABLE_COLUMNS) for row in rows)
    assert [row["line"] for row in rows[:6]] == ["Constant predictor"] * 3 + ["Stratified guess"] * 3
    row = next(r for r in rows if r["line"] == "Pretrained & tuned" and r["column"] == "sym40")
    assert (row["epochs"], row["images_seen"], row["hours"], row["trusted_labels"]) == (15, 30_000, 1.0, 0)
    assert (row["n_finished"], row["n_planned"], row["n"]) == (2, 2, 80)
    assert row["best"] != row["last"] == row["mean"]
    weighted = next(r for r in rows if r["line"] == "Reweighting (weights sigmoid)" and r["column"] == "sym40")
    assert weighted["trusted_labels"] == 125
    assert weighted["failed"] == "seed 1: finetune: ValueError: not finite | at step 3"
    assert weighted["sd"] is None


def test_runs_table_has_keys_and_settings_with_defaults(experiment):
    columns, rows = run_rows(experiment[1])
    assert {"key_split", "key_evaluate", "settings_finetune", "status"} <= set(columns)
    assert all(set(row) <= set(columns) for row in rows)
    assert [row["reason"] for row in rows if row["status"] == "failed"] == [
        "finetune: ValueError: not finite | at step 3"
    ]
    assert '"select":"balanced_accuracy"' in rows[0]["settings_finetune"]  # a default, not in the runs file


def test_the_paper_shape(experiment):
    _, _, cells = experiment
    document = make_document("Noisy", cells, MEASURE, ["A note."], decimals=2)
    grid = document.grids[0]
    assert grid.header == ["", "noise none", "noise sym20", "noise sym40"]
    assert [row[0] for row in grid.rows] == [
        "Constant predictor", "Stratified guess", "Baseline", "Reweighting (weights clamp)",
        "Reweighting (weights sigmoid)", "Pretrained & tuned",
    ]  # fmt: skip
    assert grid.rows[3][1] == "\u2013"  # never planned
    assert grid.rows[4][3].endswith(" (1 of 2)")
    baseline = cells[0].main
    assert grid.rows[2][1] == (f"{baseline.value:.2f} ± {baseline.sd:.2f} [{baseline.low:.2f}, {baseline.high:.2f}]")


HARD = Document("T_1 & <b>", "50 % | x", [Grid("Result", ["", "a_b"], [["x|y", "0.5 ± 0.1 [0, 1]"]])], ["note #1"])


def test_markdown_escapes_what_would_break_a_table():
    text = to_markdown(HARD)
    assert "| x\\|y | 0.5 ± 0.1 [0, 1] |" in text
    assert "# T_1 & &lt;b&gt;" in text
    assert text.endswith("1. note #1\n")


def test_tex_escapes_and_uses_booktabs():
    text = to_tex(HARD)
    for part in (r"T\_1 \& \textless{}b\textgreater{}", r"50 \% \textbar{} x", r"0.5 $\pm$ 0.1 {[}0, 1] \\", r"\#1"):
        assert part in text
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{ll}"))


def test_html_stands_alone():
    text = to_html(HARD)
    assert "<script" not in text
    assert "http" not in text
    assert "T_1 &amp; &lt;b&gt;" in text


def test_failed_cells_are_printed(experiment):
    _, runs, _ = experiment
    failed = [run for run in runs if not run.finished]
    cells = make_cells(failed, "noise")
    measure_cells(cells, MEASURE, 100)
    document = make_document("Noisy", cells, MEASURE, [], decimals=2)
    assert document.grids[0].rows == [["Reweighting", "failed (0 of 1)"]]
    assert '<td class="failed">failed (0 of 1)</td>' in to_html(document)


@pytest.mark.parametrize(
    ("settings", "n"),
    [
        ({"method": "supervised"}, 0),
        ({"method": "gce"}, 0),
        ({"method": "supervised", "train_on": ["train", "meta_set"]}, 12),
        ({"method": "reweight"}, 12),
        ({"method": "reweight", "meta": {"refresh": "once", "size": 5}}, 5),
        ({"method": "reweight", "mode": "as_published", "meta": {"size": 3}, "ranks": 2, "batch_size": 4}, 6),
        ({"method": "upper_bound"}, 112),
    ],
)
@pytest.mark.parametrize(
    ("noise", "validation_labels", "n_val"),
    [
        ({"rate": 0.2}, "noisy", 0),
        ({"rate": 0.2}, "true", 20),
        ({"rate": 0.2, "mode": "as_published"}, "noisy", 20),  # no validation label is flipped
        ({"rate": 0.0}, "true", 0),
    ],
)
def test_trusted_labels(tmp_path, settings, n, noise, validation_labels, n_val):
    folder = tmp_path / "split" / "k"
    folder.mkdir(parents=True)
    facts = {"sides": {"train": {"n": 100}, "val": {"n": 20}, "meta_set": {"n": 10}}, "shared_meta_set": {"test": 2}}
    (folder / "split.json").write_text(json.dumps(facts))
    finetune = {"backbone": "small_cnn", "epochs": 1, "batch_size": 2, "lr": 0.1, **settings}
    finetune["validation_labels"] = validation_labels
    settings = {"noise": {"kind": "symmetric", **noise}, "finetune": finetune}
    assert trusted_labels(Run({"keys": {"split": "k"}, "settings": settings}, tmp_path)) == n + n_val
