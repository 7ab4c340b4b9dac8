"""Facts of the noisy-labels study on ISIC 2019, by number, on its published lists.

Source: github.com/Cute77/learning-to-reweight-examples.
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pydantic import TypeAdapter
from scipy.stats import chisquare

from medmask.config.data import Noise, Split
from medmask.config.finetuning import AnyFinetuning, Proposal, Refurbish, Reweight
from medmask.config.training import Image
from medmask.data.images import ImageReader
from medmask.data.isic import (
    CLASSES,
    LABELS,
    METADATA,
    parse_row,
    plain,
    read_ground_truth,
    read_isic_lists,
    read_lesions,
)
from medmask.data.noise import count_flips, count_transitions, flip_symmetric
from medmask.data.split import make_split
from medmask.data.tables import read_rows
from medmask.methods.base import Batch, Clock
from medmask.methods.meta_learning import MetaLearning, blend_hard, blend_soft
from medmask.train.distributed import DistContext
from medmask.train.loader import Plan, Rows, TrainingData
from medmask.train.optim import build_optimizers, lr_at
from tests.toy import write_pack

ROOT = Path(os.environ.get("MEDMASK_DATA", Path(__file__).resolve().parents[3] / "shared/data")) / "isic2019"
PREFIX = "ISIC_2019_Training_GroundTruth_"
COUNTS = {
    "train": None,
    "sub5000_train": [910, 2495, 657, 191, 514, 52, 50, 131, 0],
    "sub1250_test": [206, 683, 141, 52, 108, 12, 9, 39, 0],
    "clean": [33, 88, 1, 1, 0, 1, 0, 1, 0],
    "sub_clean": [1, 0, 1, 1, 0, 1, 0, 1, 0],
}
needs_data = pytest.mark.skipif(not (ROOT / "lists").is_dir(), reason=f"no ISIC 2019 lists in {ROOT}")


def list_file(name: str) -> Path:
    return ROOT / "lists" / f"{PREFIX}{name}.csv"


@pytest.fixture(scope="module")
def manifest() -> pd.DataFrame:
    """What the stage data writes of all 25,331 images, as far as it is known without their pixels."""
    table, classes = read_ground_truth(ROOT / LABELS)
    assert classes == CLASSES
    lesions = read_lesions(ROOT / METADATA)
    lists = read_isic_lists({name: list_file(name) for name in COUNTS}, list(table["image_id"]))
    hints = table["image_id"].map(dict.fromkeys(table["image_id"], ""))
    for name, images in lists.items():
        hints = hints.where(~table["image_id"].isin(images), hints + ";" + name)
    return table.assign(
        label=table["class_name"].map(classes.index),
        group=[lesions.get(plain(image), "") for image in table["image_id"]],
        split_hint=hints.str.strip(";"),
        sha256=table["image_id"],
    )


def split(manifest: pd.DataFrame, **keys) -> tuple[pd.DataFrame, dict]:
    dataset = {"classes": CLASSES, "lists": dict.fromkeys(COUNTS, 1), "orders": {}}
    return make_split(manifest, dataset, Split(**keys))


@needs_data
def test_class_counts(manifest):
    assert np.bincount(manifest["label"], minlength=9).tolist() == [4522, 12875, 3323, 867, 2624, 239, 253, 628, 0]
    for name, counts in COUNTS.items():
        labels = manifest["label"][manifest["split_hint"].str.split(";").map(lambda names, name=name: name in names)]
        assert np.bincount(labels, minlength=9).tolist() == counts if counts else len(labels) == 20224


@needs_data
@pytest.mark.parametrize(
    ("rate", "counts"),
    [
        (0.2, [811, 2089, 605, 255, 531, 172, 169, 240, 128]),
        (0.4, [735, 1657, 599, 366, 497, 276, 305, 332, 233]),
    ],
)
def test_fact_3_published_marks(manifest, rate, counts):
    true = dict(zip(manifest["image_id"].map(plain), manifest["label"], strict=True))
    rows = [parse_row(fields) for _, fields in read_rows(list_file(f"markedgiven5000_train_{rate}"))]
    assert np.bincount([row.label for row in rows], minlength=9).tolist() == counts
    assert sum(row.mark or 0 for row in rows) == count_flips(5000, rate)
    assert all((row.label != true[plain(row.image)]) == bool(row.mark) for row in rows)
    assert all(row.given == (true[plain(row.image)] if row.mark else 0) for row in rows)


@pytest.mark.parametrize(("rate", "flips"), [(0.2, 1000), (0.4, 2000), (0.8, 4000)])
def test_fact_3_exact_number_of_flips(rate, flips):
    labels = np.repeat(range(9), COUNTS["sub5000_train"])
    noise = Noise(kind="symmetric", rate=rate, mode="as_published")
    assert (noise.sides, noise.targets) == (("train",), "all")
    noisy = flip_symmetric(labels, count_flips(len(labels), noise.rate), np.arange(9), np.random.default_rng(0))
    assert len(labels) == 5000
    assert (noisy != labels).sum() == flips


def test_fact_4_flips_are_uniform_over_the_eight_other_classes():
    for label in range(9):
        labels = np.full(8000, label)
        noisy = flip_symmetric(labels, 8000, np.arange(9), np.random.default_rng(label))
        counts = count_transitions(labels, noisy, 9)[label]
        assert counts[label] == 0
        assert chisquare(np.delete(counts, label)).pvalue > 1e-4


@needs_data
@pytest.mark.parametrize(
    "keys",
    [
        {"kind": "lists", "train": "sub5000_train", "test": "sub1250_test"},
        {"kind": "stratified", "sizes": {"train": 5000, "test": 1250}},
    ],
)
def test_fact_5_split_sizes(manifest, keys):
    check_split_sizes(manifest, keys)


def test_fact_5_split_sizes_of_other_images():
    """Of 7,000 images with two to a lesion, which as published is no reason to keep them together."""
    names = [f"i{number}" for number in range(7000)]
    labels = np.arange(7000) % 8
    made = {"image_id": names, "sha256": names, "label": labels, "class_name": [CLASSES[k] for k in labels]}
    table = pd.DataFrame({**made, "group": [f"l{number // 2}" for number in range(7000)], "split_hint": ""})
    check_split_sizes(table, {"kind": "stratified", "sizes": {"train": 5000, "test": 1250}})


def check_split_sizes(table: pd.DataFrame, keys: dict) -> None:
    rows, summary = split(table, mode="as_published", **keys)
    assert (summary["sides"]["train"]["n"], summary["sides"]["test"]["n"], len(rows)) == (5000, 1250, 6250)
    assert rows["image_id"].is_unique


def test_fact_6_row_parsing():
    row = parse_row(["1 3 ISIC_X", "0.0", "1.0", "0.0", "0.0", "0.0", "0.0", "0.0", "0.0", "0.0"])
    assert (row.mark, row.given, row.label, row.image) == (1, 3, 1, "ISIC_X")
    row = parse_row(["0 ISIC_X", "0.0", "1.0", "0.0", "0.0", "0.0", "0.0", "0.0", "0.0", "0.0"])
    assert (row.mark, row.given, row.label) == (0, None, 1)


@needs_data
def test_published_lists_share_lesions(manifest):
    keys = {"kind": "lists", "train": "sub5000_train", "test": "sub1250_test"}
    rows, summary = split(manifest, **keys, mode="as_published")
    assert summary["crossing"]["kept"]
    assert "(365 of 1250 test images)" in summary["notes"][0]
    test = rows[rows["side"] == "test"]
    assert test["group"].str.startswith("image:").sum() == 112  # no lesion is named
    assert (test["class_name"] == "NV").mean() == pytest.approx(0.5464)
    _, dropped = split(manifest, **keys)
    assert dropped["sides"]["train"]["n"] == 5000 - summary["crossing"]["images"]


@needs_data
def test_published_clean_images_that_are_on_another_side(manifest):
    keys = {"kind": "lists", "mode": "as_published", "train": "sub5000_train", "test": "sub1250_test"}
    _, summary = split(manifest, **keys, meta_set={"list": "clean"})
    assert summary["sides"]["meta_set"]["n"] == 125 - 21 - 6
    assert summary["shared_meta_set"] == {"train": 21, "test": 6}
    assert "Of 125 images of the meta set 21 on the side train and 6 on the side test too: kept" in " ".join(
        summary["notes"]
    )
    _, summary = split(manifest, **keys, meta_set={"list": "sub_clean"})
    assert summary["sides"]["meta_set"]["n"] == 5


VALUES = {
    ("baseline", "none"): 0.797, ("baseline", "published20"): 0.68, ("baseline", "published40"): 0.55,
    ("clamp", "published20"): 0.67, ("clamp", "published40"): 0.60,
    ("sigmoid", "published20"): 0.68, ("sigmoid", "published40"): 0.64,
    ("sigmoid125", "published20"): 0.69, ("sigmoid125", "published40"): 0.66,
    ("hard", "published40"): 0.60, ("soft", "published40"): 0.56, ("proposal", "published40"): 0.557,
    ("upper", "published40"): 0.70,
}  # fmt: skip


def test_published_values_and_settings():
    paper = yaml.safe_load((Path(__file__).parents[2] / "config/papers/noisy_labels.yaml").read_text())
    experiment = paper["experiments"]["noisy_labels"]
    found = {(v["run"], v.get("where", {}).get("noise", "published40")): v["value"] for v in experiment["published"]}
    assert found == VALUES
    assert {v["n"] for v in experiment["published"]} == {1250}
    blocks = {n: TypeAdapter(AnyFinetuning).validate_python(b) for n, b in paper["finetunings"].items()}
    expected = {"published": (None, False), "published_clamp": (0.25, True), "published_sigmoid": (0.25, True)}
    expected |= {"published_hard": (0.25, False), "published_soft": (None, True)}
    expected |= {"published_proposal": (0.25, True), "published_upper": (0.25, True)}
    for name, (clip, drops) in expected.items():
        cfg = blocks[name]
        assert (cfg.clip_norm, cfg.drop_last, cfg.momentum, cfg.weight_decay) == (clip, drops, 0, 1e-4), name
        assert (cfg.epochs, cfg.batch_size, cfg.order, cfg.train_mode) == (200, 128, "fixed", "first_step")
        assert cfg.augment.model_dump() == {
            "flip": 0.5, "vertical_flip": 0, "rotate": 180, "crop_scale": (0.3, 1), "crop_ratio": (3 / 4, 4 / 3),
        }  # fmt: skip
    assert blocks[blocks["published_upper"].teacher.finetune].epochs == 181
    assert (blocks["published_upper"].weights, blocks["published_upper"].rescale) == ("sigmoid", "none")


def linear_step(labels, weights, clean_label=0):
    """Weights, trusts and loss of two examples x = 1 of a linear net at 0 with two classes, at a rate of 0.1."""
    network = torch.nn.Linear(1, 2, bias=False)
    torch.nn.init.zeros_(network.weight)
    cfg = Reweight(method="reweight", weights=weights, rescale="none", epochs=1, batch_size=2, lr=0.1, momentum=0)
    method = MetaLearning(network, cfg)  # type: ignore[arg-type]
    side = Rows(np.arange(2), np.array(labels), np.array(labels))
    method.setup(TrainingData(side, side, None, side, 2), DistContext(), build_optimizers(cfg, method.param_groups()))
    one = torch.ones(1, 1)
    batch = Batch(
        one.expand(2, 1),
        torch.tensor(labels),
        torch.arange(2),
        meta=Batch(one, torch.tensor([clean_label]), torch.zeros(1)),
    )
    out = method(batch, Clock(0, 0, 0, 0.0))
    method.after_step(Clock(0, 0, 0, 0.0), DistContext())
    return method, method.memory()["weight"] / 2, out.loss


@pytest.mark.parametrize(("weights", "expected"), [("clamp", [1, 0]), ("sigmoid", [0.5125, 0.4875])])
def test_fact_1_weights_of_a_linear_net(weights, expected):
    _, found, loss = linear_step([0, 1], weights)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert float(loss.detach()) == pytest.approx(np.log(2))  # sum of w_i CE_i, both CE log 2
    if weights == "sigmoid":  # the two sigmoids sum to 1 already
        assert torch.logit(found.double()).tolist() == pytest.approx([0.05, -0.05], abs=1e-5)


def test_fact_2_targets_between_class_numbers():
    given, predicted = torch.eye(9)[[1, 0, 7]], torch.tensor([4, 5, 2])
    targets = blend_hard(given, predicted, torch.tensor([0.5, 0.9, 0.1]), "index")
    assert targets.argmax(1).tolist() == [2, 0, 2]
    assert targets.sum(1).tolist() == [1, 1, 1]


def test_fact_7_a_soft_target():
    probs = torch.tensor([[0.2, 0.3, 0.5]])
    target = blend_soft(torch.eye(3)[:1], probs, torch.tensor([0.5]))
    assert target[0].tolist() == pytest.approx([0.6, 0.15, 0.25])
    cfg = Refurbish(method="refurbish", mode="as_published", epochs=1, batch_size=2, lr=0.1)
    loss = MetaLearning(torch.nn.Linear(1, 3), cfg).losses(probs.log(), target)  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(-(target * probs.log()).sum())


def test_fact_8_weights_sum_to_one_and_may_all_be_zero():
    _, found, _ = linear_step([0, 1], "sigmoid")
    assert float(found.sum()) == pytest.approx(1)
    method, found, loss = linear_step([1, 1], "clamp")
    assert (found.tolist(), float(loss.detach())) == ([0, 0], 0)
    loss.backward()
    assert method.network.weight.grad.abs().max() == 0


def test_fact_9_learning_rates_on_four_processes():
    paper = yaml.safe_load((Path(__file__).parents[2] / "config/papers/noisy_labels.yaml").read_text())
    cfg = TypeAdapter(AnyFinetuning).validate_python(paper["finetunings"]["published"])
    assert (cfg.ranks, cfg.momentum) == (4, 0)
    assert [lr_at(cfg, epoch) for epoch in (0, 49, 50, 100, 150)] == [0.004, 0.004, 0.002, 0.001, 0.0005]


def test_fact_10_steps_of_an_epoch_on_four_processes():
    """The tests within an epoch, at steps 0, 10, 20 and 30, are defect 10: here an epoch is validated at its end."""
    keys = {"method": "reweight", "mode": "as_published", "epochs": 1, "batch_size": 128, "lr": 0.004, "ranks": 4}
    assert Plan(Reweight(**keys), 5000, world=4).steps == 39
    assert Plan(Reweight(**keys, drop_last=False), 5000, world=4).steps == 40


def test_fact_11_even_steps_renew_weights_and_odd_ones_trusts():
    cfg = Proposal(method="proposal", mode="as_published", epochs=1, batch_size=3, lr=0.1, ranks=1)
    method = MetaLearning(torch.nn.Linear(1, 2), cfg)  # type: ignore[arg-type]
    side = Rows(np.arange(3), np.zeros(3, dtype=int), np.zeros(3, dtype=int))
    ctx = DistContext()
    method.setup(TrainingData(side, side, None, side, 2), ctx, build_optimizers(cfg, method.param_groups()))
    agreement = torch.tensor([[-1.0, 0, 1], [2.0, 1, 0], [0.5, 0.1, 0.2]])
    fresh = agreement.sigmoid()
    found = []
    for step in range(3):
        clock = Clock(step, step, 0, 0.0)
        weight, trust, _ = method.judge(agreement[step], 0.1, clock)
        found.append((weight, trust))
        method.after_step(clock, ctx)
    weights = fresh / fresh.mean(1, keepdim=True)
    torch.testing.assert_close(found[0], (weights[0], torch.ones(3)))  # a trust of 1: the labels given
    torch.testing.assert_close(found[1], (weights[0], fresh[1]))
    torch.testing.assert_close(found[2], (weights[2], fresh[1]))


def test_fact_12_a_white_pixel(tmp_path):
    write_pack(tmp_path, [np.full((1, 1, 3), 255, dtype=np.uint8)])
    image = Image(mean=(0.485, 0.456, 0.406), std=(1, 1, 1))
    white = ImageReader(tmp_path / "images.npy", tmp_path / "index.npy", image).batch(np.array([0]))
    assert white.flatten().tolist() == pytest.approx([0.515, 0.544, 0.594])
