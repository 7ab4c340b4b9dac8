import copy
from dataclasses import replace

import numpy as np
import pytest

from medmask.evaluation.cells import (
    Measure,
    compare_cells,
    judge_published,
    make_cells,
    matches,
    measure_cells,
    partner,
    verdict,
)
from medmask.evaluation.claim import answer_claim, claim_page
from medmask.evaluation.collect import last_error, read_runs
from medmask.evaluation.footnotes import footnotes
from medmask.evaluation.statistics import Estimate
from tests.evaluation.fake_results import make_results

MEASURE = Measure("balanced_accuracy", "test", "last")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    content, runs = read_runs(make_results(tmp_path_factory.mktemp("fake")))
    return content["settings"], runs


@pytest.fixture
def cells(experiment):
    settings, runs = experiment
    made = make_cells(runs, "noise")
    measure_cells(made, MEASURE, 200)
    compare_cells(made, settings["reference"], MEASURE)
    judge_published(made, settings["published"], MEASURE)
    return made


def find(cells, row, noise, **changes):
    return next(c for c in cells if c.row == row and c.column == noise and all(changes[k] in c.line for k in changes))


def test_cells_group_seeds_and_each_set_value_has_its_line(cells):
    assert len(cells) == 10
    assert {len(cell.runs) for cell in cells} == {3}
    assert list(dict.fromkeys(cell.line for cell in cells)) == [
        "Baseline",
        "Reweighting (weights clamp)",
        "Reweighting (weights sigmoid)",
        "Pretrained & tuned",
    ]
    assert find(cells, "baseline", "sym40").name == "Baseline, noise sym40"


def test_without_columns_the_noise_goes_into_the_line(experiment):
    assert [cell.line for cell in make_cells(experiment[1], None)][:3] == [
        "Baseline (noise none)", "Baseline (noise sym20)", "Baseline (noise sym40)",
    ]  # fmt: skip


def test_mean_is_that_of_the_metrics_files(cells):
    cell = find(cells, "baseline", "sym20")
    values = [run.metrics["last"]["test"]["metrics"]["balanced_accuracy"]["value"] for run in cell.runs]
    assert cell.main.value == pytest.approx(np.mean(values))
    assert cell.main.sd == pytest.approx(np.std(values, ddof=1))
    assert cell.main.low < cell.main.value < cell.main.high
    assert cell.main.n_seeds == 3


def test_draws_of_one_run_give_the_interval_of_its_metrics_file(cells):
    cell = find(cells, "baseline", "sym20")
    entry = cell.runs[0].metrics["last"]["test"]["metrics"]["balanced_accuracy"]
    assert np.nanquantile(cell.draws[0], [0.025, 0.975]) == pytest.approx([entry["low"], entry["high"]])


def test_a_failed_run_leaves_the_others(cells):
    cell = find(cells, "reweight", "sym40", weights="sigmoid")
    assert cell.main.n_seeds == 2
    assert cell.reasons == {1: "finetune: ValueError: not finite | at step 3"}
    assert cell.difference.n_seeds == 2  # paired over the seeds that both have


def test_compared_with_the_reference_of_the_same_noise(cells):
    assert find(cells, "pretrained", "sym40").compared_with == "Baseline, noise sym40"
    assert find(cells, "baseline", "sym40").compared_with == ""
    cell, base = find(cells, "pretrained", "none"), find(cells, "baseline", "none")
    assert cell.difference.value == pytest.approx(cell.main.value - base.main.value)
    own = cell.main.high - cell.main.low
    assert cell.difference.high - cell.difference.low < own  # what they share has cancelled
    p_values = sorted(c.difference.p_value for c in cells if c.difference)
    assert len(p_values) == 7
    assert min(c.holm_p for c in cells if c.holm_p is not None) == pytest.approx(7 * p_values[0])


def test_no_partner_on_other_images_or_among_several(cells, experiment):
    cell, base = find(cells, "pretrained", "none"), find(cells, "baseline", "none")
    several = [c for c in cells if c.row == "reweight" and c.column == "sym20"]
    assert partner(find(cells, "baseline", "sym20"), several) is None
    other = make_cells([run for run in experiment[1] if run["row"] == "baseline" and run["noise"] == "none"], None)
    assert partner(cell, other) is other[0]
    other[0].runs[0].plan = other[0].runs[0].plan | {"keys": {"split": "another"}}
    assert partner(cell, other) is None
    other[0].runs[0].plan["keys"] = base.runs[1]["keys"]


def test_partner_of_another_split_with_the_same_test_images(cells):
    cell, other = (copy.copy(find(cells, row, "sym40")) for row in ("pretrained", "baseline"))
    plan = other.runs[0].plan
    other.runs = [replace(other.runs[0], plan=plan | {"keys": plan["keys"] | {"split": "another"}})]
    assert cell.judged_on == other.judged_on != ""
    assert partner(cell, [other]) is other
    other.judged_on = "other images"
    assert partner(cell, [other]) is None


def estimated(value=0.8, sd=0.02, n_seeds=5):
    return Estimate(value, sd, 0.7, 0.9, n_seeds)


@pytest.mark.parametrize(
    ("ours", "published", "expected"),
    [
        (estimated(), {"value": 0.85, "n": 400}, "inside"),  # the interval is 0.8 +- 0.072
        (estimated(), {"value": 0.88, "n": 400}, "outside"),
        (estimated(), {"value": 0.88, "n": None}, "not comparable: the number of published test images is not given"),
        (estimated(), {"value": 0.88, "n": 4, "not_comparable": "5x data"}, "not comparable: 5x data"),
        (estimated(sd=None, n_seeds=1), {"value": 0.8, "n": 400}, "not comparable: one seed has no spread"),
        (None, {"value": 0.8, "n": 400}, "not comparable: no run finished"),
    ],
)
def test_verdict(ours, published, expected):
    assert verdict(ours, published) == expected


def test_published_numbers_find_their_cells(cells):
    assert find(cells, "baseline", "none").verdict == "not comparable: other images"
    assert find(cells, "baseline", "sym40").verdict in ("inside", "outside")
    assert find(cells, "baseline", "sym20").verdict == "none published"
    assert not matches({"noise": "none"}, {"noise": "sym40"})


CLAIM = {
    "contrast": ["pretrained", "baseline"], "where": {"noise": "sym40"}, "against": {},
    "metric": "accuracy", "test_set": "test", "selection": "best", "margin": 0.0, "text": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {},
            [
                "**replicated**",
                "pretrained, noise sym40 is better than baseline, noise sym40",
                "3 of 3 paired seeds",
                "best epoch",
            ],
        ),
        ({"margin": 0.9}, ["**not replicated**"]),
        ({"margin": 0.05}, ["**undecided at this n**", "smallest difference that could have been seen"]),
        ({"text": "It helps"}, ["> It helps"]),
        ({"where": {"noise": "sym99"}}, ["**incomplete**", "No cell of pretrained"]),
        (
            {"contrast": ["baseline", "baseline"], "where": {"noise": "none"}, "against": {"noise": "sym40"}},
            ["Baseline, noise none minus Baseline, noise sym40"],
        ),
        ({"contrast": ["reweight", "baseline"]}, ["clamp", "sigmoid", "2 of 3 paired seeds"]),
        ({"test_set": "elsewhere"}, ["**incomplete**", "it has no test set elsewhere"]),
    ],
)
def test_claim(cells, change, words):
    text = claim_page(answer_claim(CLAIM | change, cells, 200))
    for word in words:
        assert word in text


def test_no_claim():
    assert "No claim was written down" in claim_page(answer_claim(None, [], 200))


def test_claim_without_a_paired_seed_is_incomplete(experiment):
    runs = [run for run in experiment[1] if run["seed"] == {"baseline": 0}.get(run["row"], 1)]
    text = claim_page(answer_claim(CLAIM, make_cells(runs, "noise"), 200))
    assert "**incomplete**" in text
    assert "No seed has both" in text


def test_claim_of_one_seed_says_so(experiment):
    runs = [run for run in experiment[1] if run["seed"] == 0]
    assert "one seed: the interval holds for these two networks" in claim_page(
        answer_claim(CLAIM, make_cells(runs, None), 200)
    )


def test_footnotes(cells, experiment):
    notes = "\n".join(footnotes(experiment[0], cells, MEASURE, 200))
    assert "29 of 30 planned runs have finished." in notes
    assert "120 images in" in notes
    assert "7 of 8 classes (no test image of DF)" in notes
    assert "14 training images of 12 lesions of the test set were dropped." in notes
    assert "The 3 seeds (0, 1, 2) vary: noise, finetune. All share the split." in notes
    clean = "balanced_accuracy on clean validation labels (Baseline, noise none; Pretrained & tuned, noise none)"
    assert f"was chosen by {clean}; balanced_accuracy on noisy validation labels (8 of 10 rows)." in notes
    failed = "Failed: Reweighting (weights sigmoid), noise sym40, 1 of 3 (seed 1): finetune: ValueError: not finite"
    assert failed in notes


def test_footnote_of_one_seed(cells, experiment):
    notes = footnotes(experiment[0] | {"seeds": [0]}, cells, MEASURE, 200)
    assert "One seed (0): intervals and p hold for these networks, not for the methods." in notes


@pytest.fixture
def ranked(experiment):
    """Ten rows, six of them with a published value: in the order of our means where `up`, or against it."""

    def make(up):
        made = make_cells(experiment[1], None)
        measure_cells(made, MEASURE, 100)
        order = sorted((c for c in made if c.row != "reweight"), key=lambda cell: cell.main.value)
        for k, cell in enumerate(order):
            cell.published = {"value": 0.1 * (k if up else -k), "n": 1000, "not_comparable": None, "source": "a page"}
        return made, order

    return make


def rank_sentences(made):
    settings = {"seeds": [0, 1, 2], "seed_stages": [], "reference": None}
    return [note for note in footnotes(settings, made, MEASURE, 100) if "rank correlation" in note]


@pytest.mark.parametrize(("up", "rho"), [(True, "is 1.000"), (False, "is -1.000")])
def test_the_order_of_the_rows_is_compared_with_the_published_one(ranked, up, rho):
    (note,) = rank_sentences(ranked(up)[0])
    assert f"on test set test: Spearman's rank correlation of our means with the published values {rho}" in note
    assert "over 6 of 6 rows that have one (seed 0: " in note
    assert note.count("seed ") == 3


def test_ranks_by_hand_of_a_seed_and_of_rows_that_cannot_be_compared(ranked):
    made, order = ranked(True)
    order[0].published["value"], order[1].published["value"] = 0.1, 0.0  # two neighbours change places
    order[5].published["not_comparable"] = "other images"
    (note,) = rank_sentences(made)
    assert "is 0.900 over 5 of 6 rows" in note  # 1 - 6 * 2 / (5 * 24)
    values = {seed: [cell.value(seed, MEASURE) for cell in order[:5]] for seed in (0, 1, 2)}
    ranks = {seed: [sorted(found).index(v) for v in found] for seed, found in values.items()}
    by_hand = {s: 1 - sum((a - b) ** 2 for a, b in zip(r, [1, 0, 2, 3, 4], strict=True)) / 20 for s, r in ranks.items()}
    assert "(" + ", ".join(f"seed {seed}: {rho:.3f}" for seed, rho in by_hand.items()) + ")" in note


def test_few_or_equal_ranks(ranked):
    made, order = ranked(True)
    for cell in order:
        cell.published["value"] = 0.5
    (note,) = rank_sentences(made)
    assert "not defined" in note
    order[0].published = order[1].published = None
    assert rank_sentences(made) == []


def test_each_column_has_its_own_ranks(experiment):
    made = make_cells(experiment[1], "noise")
    measure_cells(made, MEASURE, 100)
    for cell in made:
        cell.published = {"value": cell.main.value, "n": 9, "source": "a page"}
    assert rank_sentences(made) == []  # ten cells, at most four in a column
    doubled = [copy.copy(cell) for cell in made] + made
    assert [note.split(" on test set")[0] for note in rank_sentences(doubled)] == [
        "Order of the rows in column noise sym20", "Order of the rows in column noise sym40",
    ]  # fmt: skip


def test_last_error(tmp_path):
    log = tmp_path / "x.log"
    assert last_error(log) == "not run yet (no log)"
    log.write_text("fine\n")
    assert last_error(log) == "stopped without an error in its log (x.log)"
    log.write_text("fine\n12:00:00 launch: told to stop: job 5 goes on\nlast\n")
    assert last_error(log) == "12:00:00 launch: told to stop: job 5 goes on"
    log.write_text("an error here\n\x1b[31mmedmask finetune:  error: lr\x1b[0m\nbye\n")
    assert last_error(log) == "medmask finetune: error: lr"
