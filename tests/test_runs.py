"""Experiments become runs and keyed artifacts."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from medmask.config.load import load_config
from medmask.errors import ConfigError
from medmask.runs import make_plan, refuse_unavailable
from tests.test_config import put, small

PAPERS = sorted(Path("config/papers").glob("*.yaml"))
GOLDEN = Path(__file__).parent / "fixtures" / "keys.json"


def plan_of(raw):
    return make_plan(load_config(raw))


def keys(plan):
    return {stage: set(artifacts) for stage, artifacts in plan.artifacts.items() if artifacts}


def changed_stages(before, after):
    return {stage for stage in before if before[stage] != after.get(stage)}


def test_runs_are_the_product_of_axes_and_seeds():
    raw = put(small(), "experiments/e/set", {"finetune.lr": [0.1, 0.2, 0.3]})
    raw["experiments"]["e"]["exclude"] = [{"finetune.lr": 0.2}]
    plan = plan_of(raw)
    assert [(r.cell.run, r.seed) for r in plan.runs["e"]][:4] == [
        ("scratch[lr=0.1]", 0), ("scratch[lr=0.1]", 1), ("scratch[lr=0.3]", 0), ("scratch[lr=0.3]", 1),
    ]  # fmt: skip
    assert len(plan.runs["e"]) == 2 * 2 * 2


def test_common_prefixes_are_shared():
    plan = plan_of(small())
    assert {stage: len(found) for stage, found in plan.artifacts.items()} == {
        "data": 1, "split": 1, "noise": 2, "pretrain": 2, "mask": 0, "audit": 0, "finetune": 4, "evaluate": 4,
    }  # fmt: skip


def renamed(raw):
    raw["finetunings"]["another"] = raw["finetunings"].pop("plain")
    raw["finetunings"].pop("later")
    for row in raw["experiments"]["e"]["runs"].values():
        row["finetune"] = "another"
    return raw


def reordered(raw):
    return json.loads(json.dumps(raw, sort_keys=True))


SAME = {
    "renamed block": renamed,
    "reordered keys": reordered,
    "default written out": lambda raw: put(raw, "finetunings/plain/momentum", 0.9),
    "text for a number": lambda raw: put(raw, "finetunings/plain/lr", "1e-1"),
    "more workers": lambda raw: put(raw, "finetunings/plain/workers", 4),
    "another time limit": lambda raw: put(raw, "finetunings/plain/needs", {"hours": 9}),
    "preset written out": lambda raw: put(raw, "noises/sym/sides", ["train", "val"]),
    "more metrics": lambda raw: {**raw, "evaluations": {"default": {"metrics": ["f1_macro"]}}},
    "an experiment renamed": lambda raw: {**raw, "experiments": {"f": raw["experiments"]["e"]}},
    "another data root": lambda raw: {**raw, "data_root": "elsewhere"},
    "another title": lambda raw: put(raw, "experiments/e/title", "A title"),
}


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_matter_changes_no_key(name):
    assert keys(plan_of(SAME[name](small()))) == keys(plan_of(small()))


DIFFERENT = {
    "finetunings/plain/lr": (0.2, {"finetune", "evaluate"}),
    "pretrainings/base/lr": (0.2, {"pretrain", "finetune", "evaluate"}),
    "noises/sym/rate": (0.2, {"noise", "pretrain", "finetune", "evaluate"}),
    "splits/holdout/seed": (1, {"split", "noise", "pretrain", "finetune", "evaluate"}),
    "datasets/digits/resize": (4, {"data", "split", "noise", "pretrain", "finetune", "evaluate"}),
}


@pytest.mark.parametrize("path", DIFFERENT)
def test_a_change_moves_its_stage_and_what_follows(path):
    value, expected = DIFFERENT[path]
    before, after = keys(plan_of(small())), keys(plan_of(put(small(), path, value)))
    assert changed_stages(before, after) == expected


def test_ranks_matter_only_without_sync_bn():
    def digests(ranks, sync_bn):
        raw = put(put(small(), "pretrainings/base/ranks", ranks), "pretrainings/base/sync_bn", sync_bn)
        return [key[-12:] for key in plan_of(raw).artifacts["pretrain"]]

    assert digests(1, True) == digests(8, True)
    assert digests(2, False) != digests(8, False)


def test_more_ranks_change_no_key_at_all():
    more = put(small(), "pretrainings/base/ranks", 2)
    assert keys(plan_of(more)) == keys(plan_of(small()))


READER = "def read(folder):\n    return 1\n"


def test_a_reader_of_ones_own_counts_by_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = put(small(), "datasets/digits/reader", "mine.py:read")
    with pytest.raises(ConfigError, match=r"datasets.digits.reader: cannot read mine.py"):
        plan_of(raw)

    def data_keys(text):
        Path("mine.py").write_text(text)
        return list(plan_of(raw).artifacts["data"])

    assert data_keys(READER) == data_keys("# a comment\n\n" + READER)
    assert data_keys(READER) != data_keys(READER.replace("1", "2"))
    with pytest.raises(ConfigError, match=r"mine.py:1: not Python"):
        data_keys("def (")


def test_seed_stages_share_what_does_not_follow_the_seeds():
    plan = plan_of(put(small(), "experiments/e/seed_stages", ["finetune"]))
    assert len(plan.artifacts["pretrain"]) == len(plan.artifacts["noise"]) == 1
    assert len(plan.artifacts["finetune"]) == 4


def test_a_run_may_start_from_another_run():
    raw = small()
    raw["experiments"]["e"]["runs"]["again"] = {"pretrain": {"run": "scratch"}, "finetune": "plain"}
    plan = plan_of(raw)
    first, again = (next(r for r in plan.runs["e"] if r.cell.row == row) for row in ("scratch", "again"))
    assert again.artifacts["finetune"].inputs["init"] is first.artifacts["finetune"]


def test_after_chains_finetunings():
    raw = small()
    raw["experiments"]["e"]["runs"]["later"] = {"pretrain": "base", "finetune": "later"}
    plan = plan_of(raw)
    started, later = (next(r for r in plan.runs["e"] if r.cell.row == row) for row in ("started", "later"))
    assert later.artifacts["finetune"].inputs["init"] is started.artifacts["finetune"]


def rounds(rule=None, later=None):
    """A network, and two finetunings on masked images, one after the other."""
    raw = small()
    raw["masks"] = {"seen": {"method": "xgradcam"}}
    plain = raw["finetunings"]["plain"]
    first = {**plain, "masks": "seen", "mask_rule": rule or {"kind": "top_k", "cumulative": True}}
    raw["finetunings"] |= {"one": first, "two": {**first, "after": "one", **(later or {})}}
    raw["experiments"]["e"] |= {"seeds": [0], "runs": {"two": {"pretrain": "base", "finetune": "two"}}}
    return raw


def test_cumulative_masks_rest_on_those_of_the_rounds_before():
    (run,) = plan_of(rounds()).runs["e"]
    second = run.artifacts["mask"]
    first = run.artifacts["finetune"].inputs["init"].inputs["masks"]
    assert second.inputs["earlier"] is first
    assert second.settings["hidden_by"] == {"kind": "top_k", "cumulative": True}
    assert "earlier" not in first.inputs
    assert "hidden_by" not in first.settings
    (alone,) = plan_of(rounds({"kind": "top_k"})).runs["e"]
    assert set(alone.artifacts["mask"].inputs) == {"data", "split", "model"}


def test_cumulative_masks_have_one_rule():
    with pytest.raises(ConfigError, match=r"finetunings.two.mask_rule: cumulative masks need one rule in all rounds"):
        plan_of(rounds(later={"mask_rule": {"kind": "mean", "cumulative": True}}))


def test_a_round_without_masks_between_two_changes_nothing():
    raw = rounds(later={"after": "between"})
    raw["finetunings"]["between"] = {**raw["finetunings"]["plain"], "after": "one"}
    (run,) = plan_of(raw).runs["e"]
    between = run.artifacts["finetune"].inputs["init"]
    assert "masks" not in between.inputs
    assert run.artifacts["mask"].inputs["earlier"] is between.inputs["init"].inputs["masks"]


def test_the_first_round_need_not_say_that_a_later_one_is_cumulative():
    raw = rounds({"kind": "top_k"}, later={"mask_rule": {"kind": "top_k", "cumulative": True}})
    (run,) = plan_of(raw).runs["e"]
    assert run.artifacts["mask"].inputs["earlier"] is run.artifacts["finetune"].inputs["init"].inputs["masks"]


def test_masks_are_of_the_data_of_their_finetuning():
    raw = rounds()
    raw["datasets"]["other"] = {"reader": "mnist", "folder": "mnist"}
    raw["splits"]["given"] = {"kind": "folders"}
    for name in ("one", "two"):
        raw["finetunings"][name]["data"] = {"dataset": "other", "split": "given"}
    (run,) = plan_of(raw).runs["e"]
    tuned, mask = run.artifacts["finetune"], run.artifacts["mask"]
    assert mask.inputs["data"] is tuned.inputs["data"]
    assert mask.inputs["data"].key.startswith("mnist")


def continued(start=None, **changes):
    raw = small()
    raw["pretrainings"]["base"] |= {"keep_optimizer": True, **(start or {})}
    raw["finetunings"]["plain"] |= {"optimizer_state": "continued", **changes}
    raw["experiments"]["e"]["runs"] = {"started": {"pretrain": "base", "finetune": "plain"}}
    return raw


def test_momenta_go_on_from_a_network_that_kept_them():
    (run, *_) = plan_of(continued()).runs["e"]
    assert run.artifacts["finetune"].inputs["init"].settings["keep_optimizer"]


@pytest.mark.parametrize(
    "raw",
    [
        continued({"keep_optimizer": False}),
        continued({"optimizer": "adam"}),
        continued(checkpoint="best"),
        put(continued(), "experiments/e/runs", {"scratch": {"finetune": "plain"}}),
    ],
)
def test_momenta_that_are_not_there(raw):
    with pytest.raises(ConfigError, match=r"finetunings.plain.optimizer_state: to be continued it needs"):
        plan_of(raw)


def test_an_ambiguous_source_is_refused():
    raw = small()
    raw["experiments"]["e"]["runs"]["scratch"]["set"] = {"finetune.lr": [0.1, 0.2]}
    raw["experiments"]["e"]["runs"]["again"] = {"pretrain": {"run": "scratch"}, "finetune": "plain"}
    with pytest.raises(ConfigError, match=r"again.pretrain: 'scratch' stands for 2 runs a seed, need one"):
        plan_of(raw)


def test_a_pretraining_may_have_its_own_data():
    raw = small()
    raw["datasets"]["other"] = {"reader": "mnist", "folder": "mnist"}
    raw["splits"]["given"] = {"kind": "folders"}
    raw["pretrainings"]["base"]["data"] = {"dataset": "other", "split": "given"}
    plan = plan_of(raw)
    assert {key.split("_")[0] for key in plan.artifacts["pretrain"]} == {"mnist"}
    assert {key.split("_")[0] for key in plan.artifacts["finetune"]} == {"digits"}


def confident(**changes):
    raw = small()
    block = {**raw["finetunings"]["plain"], "method": "confident", "folds": 3, **changes}
    raw["finetunings"]["cleaned"] = block
    raw["experiments"]["e"] |= {"seeds": [0], "runs": {"cleaned": {"finetune": "cleaned"}}}
    return raw


def test_confident_learning_rests_on_a_training_for_each_fold():
    raw = confident()
    raw["experiments"]["e"]["runs"] |= {
        "weighted": {"finetune": "cleaned", "set": {"finetune.errors": "reweight"}},
        "plain": {"finetune": "plain"},
    }
    plan = plan_of(raw)
    by_row = {run.cell.row: run.artifacts for run in plan.runs["e"]}
    audit = by_row["cleaned"]["audit"]
    assert audit is by_row["weighted"]["audit"]
    assert "audit" not in by_row["plain"]
    assert {name: len(found) for name, found in plan.artifacts.items()} == {
        "data": 1, "split": 1, "noise": 1, "pretrain": 0, "mask": 0, "audit": 1, "finetune": 3 + 3, "evaluate": 3,
    }  # fmt: skip
    folds = [audit.inputs[f"fold{number}"] for number in range(3)]
    plain = by_row["plain"]["finetune"]
    for number, fold in enumerate(folds):
        own = {"method": "fold", "fold": number, "folds": 3}
        assert fold.settings == {**plain.settings, **own}
        assert fold.inputs == plain.inputs
    assert audit.settings == {"folds": 3, "seed": 0, "needs": {}}
    assert audit.inputs["noise"] is plain.inputs["noise"]
    assert by_row["cleaned"]["finetune"].inputs["audit"] is audit


def test_as_published_the_folds_are_trained_as_the_whole_is():
    plan = plan_of(confident(mode="as_published"))
    (run,) = plan.runs["e"]
    whole, fold = run.artifacts["finetune"], run.artifacts["audit"].inputs["fold0"]
    shared = {"order": "fixed", "sync_bn": False, "train_mode": "first_step"}
    assert all(made.settings[key] == value for made in (whole, fold) for key, value in shared.items())


@pytest.mark.parametrize("source", ["pretrain", "after"])
def test_labels_are_not_judged_by_networks_that_started_from_them(source):
    raw = confident(after="plain") if source == "after" else confident()
    if source == "pretrain":
        raw["experiments"]["e"]["pretrain"] = "base"
    text = r"finetunings.cleaned: .* starts from a network that has trained on the images whose labels it is to judge"
    with pytest.raises(ConfigError, match=text):
        plan_of(raw)
    raw["pretrainings"]["base"] = {"method": "weights", "source": "torchvision", "backbone": "small_cnn"}
    raw["finetunings"]["cleaned"].pop("after", None)
    assert plan_of(raw).artifacts["audit"]


def test_a_missing_library_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuse_unavailable(plan_of(small()))
    with pytest.raises(ConfigError, match=r"finetunings: .*pip install 'medmask\[cleanlab\]'"):
        refuse_unavailable(plan_of(confident()))


def test_as_published_sets_named_keys_only():
    published = plan_of(put(small(), "noises/sym/mode", "as_published"))
    by_hand = put(put(small(), "noises/sym/sides", ["train"]), "noises/sym/targets", "all")
    assert keys(published) == keys(plan_of(by_hand))


# the five papers ------------------------------------------------------------------------------------------------------


def test_a_config_with_the_shapes_of_all_five_papers_plans():
    raw = yaml.safe_load((Path(__file__).parent / "fixtures" / "config_papers.yaml").read_text())
    plan = plan_of(raw)
    assert {name: len(runs) for name, runs in plan.runs.items()} == {
        "demo": 4, "noisy_labels": 24, "masktune": 51, "noise_mask": 12, "transfer": 44,
    }  # fmt: skip
    by_row = {(run.cell.experiment, run.cell.row): run for run in plan.experiment_runs()}
    upper = by_row["noisy_labels", "upper"].artifacts["finetune"]
    teacher = upper.inputs["teacher"]
    assert teacher.inputs["noise"].key.startswith("isic2019_none-")
    assert teacher is by_row["noisy_labels", "erm"].artifacts["finetune"] or teacher.stage == "finetune"
    twice = by_row["masktune", "twice"].artifacts["finetune"]
    once = twice.inputs["init"]
    assert twice.inputs["masks"].inputs["model"] is once
    assert once.inputs["masks"].inputs["model"].stage == "pretrain"
    assert by_row["masktune", "twice"].artifacts["mask"] is twice.inputs["masks"]
    assert len(plan.artifacts["mask"]) == 6  # maps once per network, whatever the rule and strength
    heated = by_row["noise_mask", "heated"].artifacts["pretrain"]
    assert heated.settings["ranks"] == 8
    with pytest.raises(ConfigError, match="is not in this version"):
        refuse_unavailable(plan)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: path.stem)
def test_papers_plan_and_can_run(paper):
    plan = plan_of(yaml.safe_load(paper.read_text()))
    refuse_unavailable(plan)
    assert not any(key.startswith("digits") for key in plan.artifacts["data"])


def test_the_config_in_the_readme_plans():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "experiments:" in block]
    assert len(plan_of(yaml.safe_load(example)).runs["first"]) == 6


def test_keys_of_the_papers_are_as_reviewed():
    """After a wanted change: python -m tests.test_runs writes the file anew."""
    assert paper_keys() == json.loads(GOLDEN.read_text())


def paper_keys():
    files = [Path("config/config.yaml"), *PAPERS]
    plans = {path.stem: plan_of(yaml.safe_load(path.read_text())) for path in files}
    return {name: {stage: sorted(found) for stage, found in keys(plan).items()} for name, plan in plans.items()}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(paper_keys(), indent=1) + "\n")
