"""Mistakes in a config are refused with the key, the rule and the value."""

import copy

import pytest
import yaml

from medmask.config.base import STAGES
from medmask.config.load import load_config
from medmask.errors import ConfigError
from medmask.runs import make_plan

SMALL = """
datasets: {digits: {reader: digits}}
splits:
  holdout: {kind: stratified, sizes: {train: 0.6, val: 0.2, test: 0.2}}
  other: {kind: stratified, sizes: {train: 0.5, test: 0.5}}
noises: {sym: {kind: symmetric, rate: 0.4}}
pretrainings:
  base: {method: supervised, backbone: small_cnn, epochs: 2, batch_size: 32, lr: 0.1}
finetunings:
  plain: {method: supervised, backbone: small_cnn, epochs: 2, batch_size: 32, lr: 0.1}
  later: {method: supervised, epochs: 2, batch_size: 32, lr: 0.1, after: plain}
experiments:
  e:
    dataset: digits
    split: holdout
    noise: sym
    seeds: [0, 1]
    runs:
      scratch: {finetune: plain}
      started: {pretrain: base, finetune: plain}
"""


def small():
    return yaml.safe_load(SMALL)


def refused(raw) -> str:
    with pytest.raises(ConfigError) as caught:
        make_plan(load_config(raw))
    return str(caught.value)


def put(raw, path, value):
    *parents, last = path.split("/")
    block = raw
    for name in parents:
        block = block[name]
    block[last] = value
    return raw


BAD = {
    "best epoch of nothing": (
        "finetunings/plain/checkpoint",
        "best",
        "finetunings.plain.checkpoint: experiments.e.runs.scratch starts from no weights, so it has no best epoch",
    ),
    "unknown key": ("finetunings/plain/learning_rate", 0.1, "finetunings.plain.learning_rate: unknown key (value 0.1)"),
    "unknown section": ("finetuning", {}, "finetuning: unknown key"),
    "wrong type": ("finetunings/plain/epochs", "many", "finetunings.plain.epochs: need a valid integer"),
    "fraction of an epoch": ("finetunings/plain/epochs", 1.5, "finetunings.plain.epochs: need a valid integer"),
    "boolean for a number": ("finetunings/plain/lr", True, "finetunings.plain.lr: need a number, got a boolean"),
    "boolean for text": ("finetunings/plain/backbone", False, "put it in quotes"),
    "boolean key": ("splits/holdout", {True: 1}, "the key True was on, off, yes, no or empty; put it in quotes"),
    "out of range": ("noises/sym/rate", 1.5, "noises.sym.rate: need less than or equal to 1, got 1.5"),
    "negative": ("finetunings/plain/lr", -1, "finetunings.plain.lr: need greater than 0, got -1"),
    "not a number": ("finetunings/plain/lr", float("nan"), "finetunings.plain.lr: "),
    "unknown method": ("finetunings/plain/method", "supervized", "did you mean 'supervised'?"),
    "unknown reader": ("datasets/digits/reader", "digit", "datasets.digits.reader: need one of"),
    "unknown block": ("experiments/e/runs/scratch/finetune", "plane", "did you mean 'plain'?"),
    "unknown split": ("experiments/e/split", "holdoff", "experiments.e.runs.scratch.split: unknown name 'holdoff'"),
    "missing key": (
        "finetunings/plain",
        {"method": "supervised", "epochs": 1, "lr": 1},
        "batch_size: a needed key is missing",
    ),
    "rate of no noise": ("noises/sym/kind", "none", "`kind: none` contradicts a rate of 0.4"),
    "fractions over one": ("splits/holdout/sizes/test", 0.5, "fractions sum to 1.3, more than 1"),
    "mixed sizes": ("splits/holdout/sizes/test", 100, "need all fractions or all counts"),
    "path upwards": ("datasets/digits/folder", "../x", "need a path inside the data root"),
    "absolute path": ("datasets/digits/folder", "/x", "need a path inside the data root"),
    "stage as experiment": (
        "experiments",
        {"noise": small()["experiments"]["e"]},
        "experiments.noise: the name of a stage",
    ),
    "seed in a block": ("finetunings/plain/seed", 1, "finetunings.plain.seed: seeds come from"),
    "block called none": (
        "finetunings/none",
        {"method": "supervised", "epochs": 1, "lr": 1, "batch_size": 1},
        "choose another name",
    ),
    "set without stage": ("experiments/e/set", {"lr": 0.1}, "need stage.key, got 'lr'"),
    "set of unknown key": ("experiments/e/set", {"finetune.lrr": 0.1}, "finetunings.plain.lrr: unknown key"),
    "excluded field": ("experiments/e/exclude", [{"nois": "sym"}], "did you mean 'noise'?"),
    "all excluded": ("experiments/e/exclude", [{"noise": "sym"}], "experiments.e.exclude: leaves no run"),
    "empty axis": ("experiments/e/noise", [], "an empty list leaves no run"),
    "no row of reference": ("experiments/e/reference", "erm", "experiments.e.reference: unknown name 'erm'"),
    "no network": ("experiments/e/runs/scratch/finetune", "none", "leaves nothing to evaluate"),
    "backbone missing": ("finetunings/plain/backbone", None, "finetunings.plain.backbone: a needed key is missing"),
    "backbone contradicts": (
        "pretrainings/base/backbone",
        "resnet18",
        "small_cnn contradicts the starting weights, resnet18",
    ),
    "number for a block": ("experiments/e/runs/scratch/pretrain", 5, "scratch.pretrain: need text, got 5"),
    "typo in a source": ("experiments/e/runs/scratch/pretrain", {"runn": "x"}, "scratch.pretrain.runn: unknown key"),
    "number in an axis": ("experiments/e/runs/scratch/noise", ["sym", 3], "scratch.noise.1: need text, got 3"),
    "no seeds": ("experiments/e/seeds", [], "experiments.e.seeds: need at least 1"),
    "empty block": ("finetunings/plain", None, "finetunings.plain: need a group of keys, got None"),
    "unknown metric": (
        "evaluations",
        {"default": {"metrics": ["acc"]}},
        "evaluations.default.metrics.0: need 'accuracy'",
    ),
    "seed twice": ("experiments/e/seeds", [0, 0], "experiments.e.seeds: need different ones, got [0, 0]"),
    "test set of no split": (
        "evaluations",
        {"default": {"test_sets": ["tset"]}},
        "evaluations.default.test_sets: split holdout has no test set 'tset'; did you mean 'test'?",
    ),
    "table of no test set": (
        "experiments/e/table",
        {"test_set": "raw"},
        "experiments.e.table.test_set: unknown name 'raw'; choices: test",
    ),
    "table of no field": (
        "experiments/e/table",
        {"columns": "nois"},
        "table.columns: unknown name 'nois'; did you mean",
    ),
    "published for no field": (
        "experiments/e/published",
        [{"run": "scratch", "where": {"nois": "x"}, "value": 1, "source": "x"}],
        "experiments.e.published[0].where: unknown name 'nois'",
    ),
    "published for no cell": (
        "experiments/e/published",
        [{"run": "scratch", "where": {"noise": "none"}, "value": 1, "source": "x"}],
        "experiments.e.published[0].where: {'noise': 'none'} fits no run of scratch",
    ),
    "claim with itself": ("experiments/e/claim", {"contrast": ["scratch", "scratch"]}, "scratch with itself"),
    "claim about no cell": (
        "experiments/e/claim",
        {"contrast": ["scratch", "started"], "against": {"noise": "none"}},
        "experiments.e.claim.where: {'noise': 'none'} fits no run of started",
    ),
    "excludes nothing": (
        "experiments/e/exclude",
        [{"noise": "none"}],
        "experiments.e.exclude: {'noise': 'none'} fits no",
    ),
    "too many parts": ("finetunings/plain/accumulate", 20, "accumulate: 20 parts of 32 images"),
    "size of small_cnn": ("finetunings/plain/image", {"size": 32}, "image.size: small_cnn needs 28, got 32"),
    "random weights kept": (
        "finetunings/plain/freeze",
        "all",
        "finetunings.plain.freeze: all would keep random weights",
    ),
    "ranks over batch": ("pretrainings/base/ranks", 64, "32 images cannot be shared by 64 ranks"),
    "unknown run": (
        "experiments/e/runs/scratch/pretrain",
        {"run": "nobody"},
        "unknown name 'nobody'; choices: scratch, started",
    ),
    "empty source": ("experiments/e/runs/scratch/pretrain", {}, "a source needs `run` or a changed field"),
    "self": ("experiments/e/runs/scratch/pretrain", {"run": "scratch"}, "its sources go in a circle: plain -> plain"),
    "after itself": ("finetunings/plain/after", "plain", "its sources go in a circle"),
    "other split": (
        "pretrainings/base/data",
        {"dataset": "digits", "split": "other"},
        "has trained on the test images of dataset digits, split holdout",
    ),
    "trusted images of no meta set": (
        "finetunings/plain/method",
        "reweight",
        "meta_set: a needed key is missing: experiments.e.runs.scratch trains with trusted images (reweight, ",
    ),
    "training on no meta set": (
        "finetunings/plain/train_on",
        ["train", "meta_set"],
        "splits.holdout.meta_set: a needed key is missing",
    ),
    "upper bound without a teacher": (
        "finetunings/plain/method",
        "upper_bound",
        "finetunings.plain.teacher: needed by `method: upper_bound`",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistake_is_refused_with_the_key(name):
    path, value, message = BAD[name]
    text = refused(put(small(), path, value))
    assert message in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("wish", [{"draw": 8}, {"counts": {"0": 5, "1": 3}}])
def test_a_step_cannot_have_more_trusted_images_than_there_are(wish):
    raw = put(small(), "splits/holdout/meta_set", wish)
    raw["finetunings"]["plain"] |= {"method": "reweight", "meta": {"size": 9}}
    text = refused(raw)
    assert text == "finetunings.plain.meta.size: need at most the 8 images of splits.holdout.meta_set, got 9"
    make_plan(load_config(put(raw, "finetunings/plain/meta", {"size": 8})))


CONFIDENT = {
    "one fold": ({"folds": 1}, "folds: need greater than or equal to 2, got 1"),
    "trusted images alone": ({"train_on": ["meta_set"]}, "train_on: need train, since trusted labels have no errors"),
    "true labels": ({"train_labels": "true"}, "train_labels: need noisy, since true labels have no errors"),
    "a fold too many": ({"method": "fold", "folds": 3, "fold": 3}, "fold: need one of 0..2, got 3"),
    "a fold of nothing": (
        {"method": "fold", "folds": 3, "fold": 0, "train_on": ["meta_set"]},
        "train_on: need train, whose images are shared out, got ['meta_set']",
    ),
}


@pytest.mark.parametrize("name", CONFIDENT)
def test_mistakes_in_confident_learning(name):
    changes, message = CONFIDENT[name]
    raw = small()
    raw["finetunings"]["plain"] |= {"method": "confident", **changes}
    text = refused(raw)
    assert message in text, text
    assert len(text.splitlines()) == 1


def test_circle_through_two_rows_names_both():
    raw = small()
    raw["experiments"]["e"]["runs"] = {
        "a": {"pretrain": {"run": "b"}, "finetune": "plain"},
        "b": {"pretrain": {"run": "a"}, "finetune": "plain"},
    }
    text = refused(raw)
    assert "circle: a -> b -> a" in text


def test_two_mistakes_take_two_lines():
    raw = put(put(small(), "finetunings/plain/lr", -1), "noises/sym/rate", 7)
    assert len(refused(raw).splitlines()) == 2


def test_a_leak_can_be_counted_instead():
    raw = put(small(), "pretrainings/base/data", {"dataset": "digits", "split": "other"})
    raw["evaluations"] = {"default": {"leak": "count"}}
    make_plan(load_config(raw))


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1.0e-3"])
def test_numbers_have_one_meaning(text):
    lr = yaml.safe_load(f"lr: {text}")["lr"]
    plan = make_plan(load_config(put(small(), "finetunings/plain/lr", lr)))
    reference = make_plan(load_config(put(small(), "finetunings/plain/lr", 0.001)))
    assert list(plan.artifacts["finetune"]) == list(reference.artifacts["finetune"])


def test_loading_does_not_change_what_it_is_given():
    raw = small()
    before = copy.deepcopy(raw)
    load_config(raw)
    assert raw == before


def test_every_stage_name_is_refused_for_an_experiment():
    for stage in STAGES:
        raw = small()
        raw["experiments"] = {stage: raw["experiments"]["e"]}
        assert f"experiments.{stage}" in refused(raw)
