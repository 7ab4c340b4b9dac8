"""Model files and the weights of others."""

import pickle
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medmask import io
from medmask.config.training import Weights
from medmask.errors import CheckpointError, ConfigError
from medmask.models import weights
from medmask.models.backbones import Classifier, build_backbone
from medmask.models.heads import build_head
from medmask.models.weights import (
    ModelSpec,
    load_backbone,
    load_classifier,
    load_published,
    load_source,
    read_model,
    save_model,
)  # fmt: skip
from tests.toy import is_same

SPEC = ModelSpec("small_cnn", {"kind": "mlp_bn", "hidden": 8}, 3, ["a", "b", "ü"], {"size": 28, "channels": 1}, 5)


def network() -> Classifier:
    torch.manual_seed(0)
    return Classifier(build_backbone("small_cnn", 1), build_head(SPEC.head, width=512, n_classes=3))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_model_file_round_trips(tmp_path):
    first = network()
    save_model(tmp_path / "m.safetensors", first, SPEC, np.array([5, -3, 5]))
    second, spec, seen = load_classifier(tmp_path / "m.safetensors", n_classes=3)
    assert spec == SPEC
    assert seen.tolist() == [-3, 5]
    assert seen.dtype == np.int64
    assert is_same(first.state_dict(), second.state_dict())
    assert not second.training
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_channels_last_weights_are_saved(tmp_path):
    first = network().to(memory_format=torch.channels_last)
    save_model(tmp_path / "m.safetensors", first.state_dict(), SPEC, np.empty(0))
    assert is_same(first.state_dict(), read_model(tmp_path / "m.safetensors")[0])


def test_a_truncated_model_file(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(path, network(), SPEC, np.empty(0))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"m.safetensors: not a whole safetensors file"):
        load_classifier(path)


def test_a_model_file_of_others(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"not a model file of medmask; load it with .* `method: weights`"):
        read_model(tmp_path / "m.safetensors")


def test_another_architecture_lists_every_name(tmp_path):
    spec = ModelSpec(**{**vars(SPEC), "head": {"kind": "linear"}})
    save_model(tmp_path / "m.safetensors", network(), spec, np.empty(0))
    with pytest.raises(CheckpointError) as error:
        load_classifier(tmp_path / "m.safetensors")
    assert "weights of another architecture" in str(error.value)
    assert "missing: head.weight (3, 512)" in str(error.value)
    assert "left over: head.0.weight (8, 512)" in str(error.value)


def test_another_number_of_classes(tmp_path):
    save_model(tmp_path / "m.safetensors", network(), SPEC, np.empty(0))
    with pytest.raises(CheckpointError, match="has 3 classes, the data have 2"):
        load_classifier(tmp_path / "m.safetensors", n_classes=2)


def test_a_backbone_alone_cannot_classify(tmp_path):
    spec = ModelSpec(**{**vars(SPEC), "head": {}, "n_classes": 0, "classes": []})
    save_model(tmp_path / "m.safetensors", {"backbone.x": torch.zeros(1)}, spec, np.empty(0))
    with pytest.raises(CheckpointError, match="a backbone without a head, which cannot classify"):
        load_classifier(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": {"size": 28}}, "image: need `channels`"),
        ({"image": {"channels": 2}}, "channels"),
        ({"head": {"kind": "mlp_bn", "width": 8}}, "width"),
        ({"head": {"kind": "mlp_bn", "hidden": 8, "ratio": 1.0}}, "head: need the keys kind, hidden, got"),
        ({"head": {"kind": "mlp_bn"}}, "head: need the keys kind, hidden, got kind"),
        ({"classes": ["a"]}, "n_classes: 3, but 1 classes are named"),
    ],
)
def test_a_description_that_builds_no_network(tmp_path, change, message):
    save_model(tmp_path / "m.safetensors", network(), ModelSpec(**{**vars(SPEC), **change}), np.empty(0))
    with pytest.raises(CheckpointError, match="its description does not fit this version: ") as error:
        load_classifier(tmp_path / "m.safetensors")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    broken = network()
    broken.backbone[3].bias.data[2] = value
    save_model(tmp_path / "m.safetensors", broken, SPEC, np.empty(0))
    with pytest.raises(CheckpointError, match=r"m.safetensors: NaN or infinite values in backbone\.3\.bias$"):
        load_classifier(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"w.pt: NaN or infinite values in 3\.bias$"):
        load_backbone(build_backbone("small_cnn", 1), load_source(tmp_path / "m.safetensors"), "w.pt")


@pytest.mark.parametrize("nest", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.backbone."])
def test_weights_of_others_with_their_wrappers(tmp_path, nest, prefix):
    backbone = build_backbone("small_cnn", 1)
    content = OrderedDict((prefix + name, value) for name, value in backbone.state_dict().items())
    content[(prefix.removesuffix("backbone.")) + "fc.weight"] = torch.zeros(2, 512)
    torch.save({nest: content, "epoch": 3, "args": [1, "a"]} if nest else content, tmp_path / "w.pth")
    fresh = build_backbone("small_cnn", 1)
    load_backbone(fresh, load_source(tmp_path / "w.pth"), "w.pth")
    assert is_same(backbone.state_dict(), fresh.state_dict())


def test_our_own_file_is_a_source_too(tmp_path):
    first = network()
    save_model(tmp_path / "m.safetensors", first, SPEC, np.array([1]))
    assert is_same(first.backbone.state_dict(), load_source(tmp_path / "m.safetensors"))


def test_old_files_do_not_count_batches(tmp_path):
    state = {k: v for k, v in build_backbone("small_cnn", 1).state_dict().items() if "num_batches" not in k}
    load_backbone(build_backbone("small_cnn", 1), state, "w")


def test_the_backbone_is_loaded_strictly():
    state = build_backbone("small_cnn", 3).state_dict()
    state["extra.weight"] = torch.zeros(2)
    del state["3.bias"]
    with pytest.raises(CheckpointError) as error:
        load_backbone(build_backbone("small_cnn", 1), state, "w.pt")
    assert str(error.value).splitlines() == [
        "w.pt: weights of another architecture:",
        "  missing: 3.bias (16,)",
        "  left over: extra.weight (2,)",
        "  0.weight: need (16, 1, 3, 3), got (16, 3, 3, 3)",
    ]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_pickle_is_not_run(tmp_path):
    for name, write in (
        ("a.pt", lambda path: torch.save({"model": Evil(str(tmp_path / "ran"))}, path)),
        ("b.pth", lambda path: path.write_bytes(pickle.dumps(Evil(str(tmp_path / "ran"))))),
    ):
        write(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name}: holds code or objects, not only tensors") as error:
            load_source(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_truncated_source(tmp_path, name):
    path = tmp_path / name
    state = build_backbone("small_cnn", 1).state_dict()
    torch.save(state, path) if name == "w.pt" else save_file(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=f"{name}: not a whole weights file") as error:
        load_source(path)
    assert "\n" not in str(error.value)


def test_other_bad_sources(tmp_path):
    with pytest.raises(ConfigError, match="file: no such weights file: "):
        load_published(published("file", file=str(tmp_path / "none.pt")))
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="no weights at the top or under model, state_dict"):
        load_source(tmp_path / "w.pt")
    digest = io.file_digest(tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=f"w.pt: sha256 is {digest}, the settings say 0000"):
        load_published(published("file", file=str(tmp_path / "w.pt"), sha256="0" * 64))


def published(source, **more) -> Weights:
    return Weights(method="weights", source=source, backbone=more.pop("backbone", "resnet18"), **more)


@pytest.fixture
def torchvision_file(tmp_path, monkeypatch):
    """A file in torch's own cache, named as torchvision's, and its sha256."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pth")
    digest = io.file_digest(tmp_path / "w.pth")
    path = (tmp_path / "w.pth").rename(folder / f"net-{digest[:8]}.pth")
    member = SimpleNamespace(url=f"https://nowhere.invalid/{path.name}")
    enum = SimpleNamespace(__members__={"IMAGENET1K_V1": member})
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda name: enum)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return path, digest


def test_torchvision_weights_are_fetched_once_and_always_checked(torchvision_file, monkeypatch):
    path, digest = torchvision_file
    monkeypatch.setattr(weights.hub, "download_url_to_file", None)  # a file that is there is not fetched
    state, sha256 = load_published(published("torchvision", sha256=digest))
    assert (list(state), sha256) == (["a"], digest)
    with pytest.raises(CheckpointError, match=f"resnet18 of torchvision: sha256 is {digest}, the settings say 00"):
        load_published(published("torchvision", sha256="0" * 64))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"{path.name}: damaged, its sha256 does not begin with {digest[:8]}"):
        load_published(published("torchvision"))
    path.unlink()
    path.parent.rmdir()
    asked = []

    def fetch(url, to, prefix, progress):
        asked.append((url, to, prefix))
        path.write_bytes(whole)

    monkeypatch.setattr(weights.hub, "download_url_to_file", fetch)
    assert load_published(published("torchvision"))[1] == digest
    assert asked == [(f"https://nowhere.invalid/{path.name}", str(path), digest[:8])]


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_without_a_network_the_error_says_what_to_do(monkeypatch, tmp_path, source):
    def fail(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("timm.create_model", fail)
    monkeypatch.setattr(weights.hub, "download_url_to_file", fail)
    with pytest.raises(CheckpointError, match=rf"from {source}: cannot be fetched \(OSError: no route.*`source: file`"):
        load_published(published(source))


def test_timm_weights_are_those_of_the_library_and_checked(monkeypatch):
    model = nn.Linear(2, 2)
    monkeypatch.setattr("timm.create_model", lambda name, pretrained, num_classes: model)
    state, sha256 = load_published(published("timm", backbone="timm.x"))
    assert is_same(state, model.state_dict())
    assert load_published(published("timm", backbone="timm.x", sha256=sha256))[1] == sha256
    nn.init.zeros_(model.bias)
    with pytest.raises(CheckpointError, match=f"timm.x of timm: sha256 is .*, the settings say {sha256}"):
        load_published(published("timm", backbone="timm.x", sha256=sha256))


def test_an_unknown_network_or_version_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match="version: unknown name 'V9'; choices: DEFAULT, IMAGENET1K_V1"):
        load_published(published("torchvision", version="V9"))
    with pytest.raises(ConfigError, match="backbone: unknown name 'small_cnn'; choices: alexnet"):
        load_published(published("torchvision", backbone="small_cnn"))
