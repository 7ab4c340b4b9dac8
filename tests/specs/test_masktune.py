"""Facts of the MaskTune reimplementation and of the official code on biased MNIST, by number.

Source: arXiv 2210.00055; the public repositories "Neural-Networks" (vmazashvili) and "Masktune" (aliasgharkhani).
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pydantic import TypeAdapter
from torch import nn

from medmask.config.data import Dataset, Shortcut, Split
from medmask.config.finetuning import MaskRule
from medmask.config.load import load_config
from medmask.config.training import Head, Supervised
from medmask.data.readers import read_source
from medmask.data.shortcut import draw_cue
from medmask.data.split import make_split
from medmask.evaluation.metrics import Sample
from medmask.evaluation.scores import score_test_set
from medmask.evaluation.selective import combine
from medmask.models.backbones import Classifier, build_backbone
from medmask.models.heads import build_head, head_settings
from medmask.runs import make_plan
from medmask.saliency.layers import find_layer
from medmask.saliency.maps import Explainer, xgradcam
from medmask.saliency.masks import hide_salient
from medmask.stages.data import hints
from medmask.train.loader import Plan
from medmask.train.optim import lr_at

ROOT = Path(os.environ.get("MEDMASK_DATA", Path(__file__).resolve().parents[3] / "shared/data"))
RELABEL = {"0": [0, 1, 2, 3, 4], "1": [5, 6, 7, 8, 9]}
RATE = {"0": 0.99, "1": 0.01}
OFFICIAL = Shortcut(size=4, colour=(255, 0, 0), rate=RATE, draw="first")
NOTEBOOK = Shortcut(size=6, colour=(0, 0, 255), rate=RATE)


@pytest.fixture(scope="module")
def manifest() -> pd.DataFrame:
    if not (ROOT / "mnist").is_dir():
        pytest.skip(f"no MNIST in {ROOT}")
    source = read_source(ROOT, Dataset(reader="mnist", folder="mnist", relabel=RELABEL))
    table = source.table.assign(split_hint=hints(source), sha256=source.table["image_id"])
    return table.assign(label=table["class_name"].astype(int))


def split(manifest: pd.DataFrame, shortcut: Shortcut, val: float = 0.0) -> pd.DataFrame:
    dataset = {"classes": ["0", "1"], "lists": {"train": 60000, "test": 10000}, "n": 70000}
    dataset["shortcut"] = shortcut.model_dump(mode="json")
    return make_split(manifest, dataset, Split(kind="folders", val=val))[0]


def test_1_counts(manifest):
    rows = split(manifest, OFFICIAL, val=0.2)
    fitted = rows[rows["side"] != "test"]
    assert rows["side"].value_counts()[["train", "val"]].to_dict() == {"train": 48000, "val": 12000}
    assert fitted["label"].value_counts().to_dict() == {0: 30596, 1: 29404}
    assert fitted.groupby("label")["has_cue"].sum().to_dict() == {0: 30290, 1: 294}
    conflicting = rows[rows["test_set"] == "bias_conflicting"]
    assert conflicting["label"].value_counts().to_dict() == {0: 5139, 1: 4861}
    assert conflicting.groupby("label")["has_cue"].sum().to_dict() == {0: 0, 1: 4861}
    assert rows[rows["test_set"] == "raw"]["has_cue"].sum() == 0


def test_1_each_image_by_itself(manifest):
    """The notebook's draw: binomial counts, within 4 standard deviations of 30,290.04 and 294.04."""
    rows = split(manifest, NOTEBOOK)
    counts = rows[rows["side"] == "train"].groupby("label")["has_cue"].sum()
    assert abs(counts[0] - 30290) < 4 * 17.4
    assert abs(counts[1] - 294) < 4 * 17.1


@pytest.mark.parametrize(("shortcut", "n", "value"), [(NOTEBOOK, 36, [0, 0, 1]), (OFFICIAL, 16, [1, 0, 0])])
def test_2_pixels_of_the_cue(shortcut, n, value):
    cued = draw_cue(np.full((28, 28, 3), 9, dtype=np.uint8), shortcut, 0) / 255
    assert (cued == value).all(axis=2).sum() == n
    side = int(n**0.5)
    assert (cued[:side, :side] == value).all()


def hidden(maps: torch.Tensor, **rule) -> int:
    maps = maps.view(1, 8, 8)
    return int((hide_salient(maps, MaskRule(**rule), 8, 8) == 0).sum())


def test_3_network():
    torch.manual_seed(0)
    backbone = build_backbone("small_cnn", 3)
    head = build_head(head_settings(Head(kind="mlp_bn")), width=512, n_classes=2)
    network = Classifier(backbone, head).eval()
    assert sum(p.numel() for p in network.parameters()) == 149_202
    assert sum(p.numel() for p in backbone.parameters()) == 16_848
    images = torch.rand(5, 3, 28, 28)
    name, layer = find_layer(network, "last_relu", images[:1])
    assert name == "backbone.12"
    assert isinstance(layer, nn.ReLU)
    shapes = []
    layer.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    assert network(images[:1]).shape == (1, 2)
    assert shapes == [(1, 32, 8, 8)]


def test_4_rules():
    maps = torch.arange(64) / 63
    assert hidden(maps, kind="top_k", strength=0.1) == 7
    assert hidden(maps, kind="top_k", strength=0.5) == 32
    assert hidden(maps, kind="threshold", strength=1) == 0
    assert hidden(maps, kind="mean", strength=0.9) == 35


def test_5_official_rule():
    maps = torch.tensor([1.0] * 9 + [11.0] + [0.0] * 54)
    assert hidden(maps, kind="official") == 1
    maps[9] = 7.9  # mean 1.69, sd 2.07: 7.9 is above 5.83 still, and nothing else is
    assert hidden(maps, kind="official") == 1
    assert hidden(torch.tensor([1.0] * 5 + [0.0] * 59), kind="official") == 0
    borderline = torch.tensor([0.9686] * 4 + [1.0] + [0.0] * 59).half().float()  # of 5 the largest equals m + 2 sd
    assert hidden(borderline, kind="official") == 0
    assert hidden(torch.zeros(64), kind="official") == 0


def test_6_maps_and_masked_pixels():
    torch.manual_seed(0)
    network = Classifier(build_backbone("small_cnn", 3), nn.Linear(512, 2))
    nn.init.uniform_(network.head.weight)  # so that every activation speaks for the class
    maps, _ = Explainer(network, network.backbone[12], "xgradcam")(torch.rand(4, 3, 28, 28))
    assert maps.amin((1, 2)).tolist() == [0] * 4
    assert maps.amax((1, 2)).tolist() == [1] * 4
    mask = hide_salient(maps, MaskRule(kind="top_k", strength=0.1), 28, 28)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    soft = hide_salient(maps, MaskRule(kind="top_k", strength=0.1, edges="soft"), 28, 28)
    assert len(soft.unique()) > 2


def test_7_weight():
    activation, gradient = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2), torch.tensor([2.0, 2.0]).view(1, 1, 1, 2)
    assert xgradcam(activation, gradient, 1e-8).item() == pytest.approx(2)


def paper(name):
    return yaml.safe_load((Path(__file__).parents[2] / f"config/papers/{name}.yaml").read_text())


def training(block):
    return TypeAdapter(Supervised).validate_python(block)


@pytest.mark.parametrize(
    ("name", "rates"), [("masktune", [0.01] * 25 + [0.005] * 25), ("masktune_official", [0.01] * 100)]
)
def test_8_learning_rates(name, rates):
    cfg = training(paper(name)["pretrainings"]["erm"])
    assert [lr_at(cfg, epoch) for epoch in range(cfg.epochs)] == pytest.approx(rates)
    sgd = paper(name)["finetunings"]["sgd" if name == "masktune" else "masked"]
    assert sgd["lr"] == pytest.approx(rates[-1])  # one epoch at the last rate


@pytest.mark.parametrize(("right", "published"), [((0.8227, 0.9998), 0.9088), ((0.9856, 0.8566), 0.9229)])
def test_9_overall_accuracy_of_the_published_rows(right, published):
    sizes = (5139, 4861)
    labels = np.repeat([0, 1], sizes)
    is_right = np.concatenate([np.arange(n) < round(n * share) for n, share in zip(sizes, right, strict=True)])
    scores = score_test_set(
        Sample(labels, np.eye(2)[np.where(is_right, labels, 1 - labels)]), list(map(str, range(10000))), "ab", draws=2
    )
    assert scores["metrics"]["accuracy"]["value"] == pytest.approx(published, abs=1e-4)
    assert [scores["per_class"][name]["recall"] for name in "ab"] == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize(("n", "steps"), [(60000, 469), (48000, 375)])
def test_10_one_pass(n, steps):
    block = {"method": "supervised", "epochs": 1, "batch_size": 128, "lr": 0.01}
    assert Plan(training(block), n, 1).steps == steps


def test_12_selective_score():
    found = combine(np.array([[0.8, 0.2]]), np.array([[0.6, 0.4]]))
    assert found[0] == pytest.approx([0.599, 0.401], abs=1e-3)


def test_11_one_base_network_and_15_of_the_grid():
    runs = make_plan(load_config(paper("masktune"))).runs["masktune"]
    chosen = [run for run in runs if run.seed == 0 and run.cell.row in ("erm", "top_k", "masked")]
    assert len({run.artifacts["evaluate"].inputs["model"].key for run in chosen}) == 16
    assert len({run.artifacts["pretrain"].key for run in runs if run.seed == 0}) == 1
