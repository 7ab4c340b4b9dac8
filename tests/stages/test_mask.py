"""The stage mask, and a finetuning on masked images: files in, files out."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medmask import io
from medmask.config.finetuning import Explanation, MaskRule
from medmask.config.training import Image
from medmask.data.images import ImageReader
from medmask.errors import CheckpointError, ConfigError, DataError
from medmask.models.weights import load_classifier, read_model, save_model
from medmask.saliency.maps import Explainer
from medmask.saliency.masks import Masks, hide_salient
from medmask.stages import finetune, mask
from tests.stages.test_training import run as train
from tests.toy import is_same, settings, write_data

CONFIG = Explanation(method="xgradcam", needs={"gpu": 0, "cpus": 1})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), n_meta=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory, data):
    return train(tmp_path_factory.mktemp("trained"), data)["model"]


def run(folder, data, model, cfg=CONFIG, earlier=None):
    folder.mkdir(exist_ok=True)
    files = {name: data[name] for name in mask.INPUTS if name != "model"}
    outputs = {"maps": folder / "maps.safetensors", "record": folder / "record.json"}
    extra = {"work_dir": folder / "work", "checkpoint_min": 15, "stop": None, "check": lambda: None}
    mask.run(cfg, **files, model=model, **outputs, **extra, earlier=earlier)
    return outputs


@pytest.fixture(scope="module")
def maps(tmp_path_factory, data, model):
    return run(tmp_path_factory.mktemp("maps"), data, model)


def test_maps_of_the_training_images_and_of_no_others(maps, data, model):
    content, record = load_file(maps["maps"]), json.loads(maps["record"].read_text())
    assert content["positions"].tolist() == [*range(34), *range(48, 52)]  # 34 to 47 are for validation
    assert content["maps"].shape == (38, 8, 8)
    assert content["maps"].dtype == torch.float16
    assert (record["layer"], record["images"], record["computed"]) == ("backbone.12", 38, 38)
    network, spec, _ = load_classifier(model)
    reader = ImageReader(data["images"], data["index"], type(settings().image)(**spec.image))
    classes = torch.tensor([i % 2 for i in range(5)])
    expected, _ = Explainer(network, network.backbone[12], "xgradcam")(reader.batch(np.arange(5)), classes)
    torch.testing.assert_close(content["maps"][:5].float(), expected, rtol=0, atol=1e-3)


def test_target_method_and_layer_matter(tmp_path, maps, data, model):
    state, spec, seen = read_model(model)
    wrong = {name: -value if name.startswith("head.") else value for name, value in state.items()}
    save_model(tmp_path / "wrong.safetensors", wrong, spec, seen)  # every image becomes the other class

    def found(name, model=model, **change):
        return load_file(run(tmp_path / name, data, model, CONFIG.model_copy(update=change))["maps"])["maps"]

    own = load_file(maps["maps"])["maps"]
    assert not torch.equal(found("a", method="gradcam"), own)
    assert found("b", layer="backbone.9").shape[1:] == (10, 10)
    true, predicted = (found(name, tmp_path / "wrong.safetensors", target=name) for name in ("true", "predicted"))
    assert not torch.equal(true, predicted)


def test_a_stop_in_the_middle_redoes_no_finished_shard(tmp_path, monkeypatch, maps, data, model):
    monkeypatch.setattr(mask, "PIXELS_A_BATCH", 1)  # 16 images a batch
    monkeypatch.setattr(mask, "BATCHES_A_SHARD", 1)
    real, calls = Explainer.__call__, []

    def counted(self, images, targets=None):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(images))
        return real(self, images, targets)

    monkeypatch.setattr(Explainer, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data, model)
    assert calls == [16, 16]
    assert not (tmp_path / "maps.safetensors").exists()
    monkeypatch.setattr(Explainer, "__call__", real)
    outputs = run(tmp_path, data, model)
    assert json.loads(outputs["record"].read_text())["computed"] == 38 - 32
    whole, parts = load_file(maps["maps"]), load_file(outputs["maps"])
    assert torch.equal(whole["positions"], parts["positions"])
    torch.testing.assert_close(whole["maps"], parts["maps"], rtol=0, atol=2e-3)
    mask.tidy(tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_an_unknown_layer_names_the_others(tmp_path, data, model):
    with pytest.raises(ConfigError, match=r"mask.layer: no layer 'backbone.99' whose output is a map; .*backbone.12"):
        run(tmp_path, data, model, Explanation(method="xgradcam", layer="backbone.99"))


def masked(**changes):
    return settings(epochs=1, masks="x", mask_rule={"kind": "top_k", "strength": 0.3, **changes})


def test_finetuning_on_masked_images(tmp_path, data, model, maps):
    plain = train(tmp_path / "plain", data, finetune, settings(epochs=1), init=model)
    hidden = train(tmp_path / "hidden", data, finetune, masked(), init=model, maps=maps["maps"])
    nothing = train(tmp_path / "nothing", data, finetune, masked(strength=0.0), init=model, maps=maps["maps"])
    weights = [read_model(files["model"])[0] for files in (plain, hidden, nothing)]
    assert not is_same(weights[0], weights[1])
    assert is_same(weights[0], weights[2])
    notes = json.loads(hidden["record"].read_text())["notes"]
    assert any(note.startswith("masks (top_k 0.3) hide ") and "34 training images" in note for note in notes)


RULE = MaskRule(kind="top_k", strength=0.2, cumulative=True)


def test_a_second_round_explains_and_hides_what_the_first_has_left(tmp_path, data, model, maps):
    cfg = CONFIG.model_copy(update={"hidden_by": RULE})
    content = load_file(run(tmp_path, data, model, cfg, earlier=maps["maps"])["maps"])
    first = load_file(maps["maps"])
    assert torch.equal(content["earlier"], first["maps"][None])
    positions = np.arange(5)
    masks = Masks(maps["maps"], RULE, positions, seed=0)
    network, spec, _ = load_classifier(model)
    reader = ImageReader(data["images"], data["index"], type(settings().image)(**spec.image), masks=masks)
    expected, _ = Explainer(network, network.backbone[12], "xgradcam")(reader.batch(positions), torch.arange(5) % 2)
    torch.testing.assert_close(content["maps"][:5].float(), expected, rtol=0, atol=1e-3)
    assert not torch.equal(content["maps"], first["maps"])

    both = Masks(tmp_path / "maps.safetensors", RULE, positions, seed=0)(positions, 8, 8)
    newest = hide_salient(content["maps"][:5].float(), RULE, 8, 8)
    assert torch.equal(both, masks(positions, 8, 8) * newest)
    assert both.mean() < newest.mean()
    (note,) = Masks(tmp_path / "maps.safetensors", RULE, positions, seed=0).notes()
    assert note == f"masks (top_k 0.2) hide {1 - float(both.mean()):.1%} of the cells of 5 training images"
    third = load_file(run(tmp_path / "third", data, model, cfg, earlier=tmp_path / "maps.safetensors")["maps"])
    assert third["earlier"].shape == (2, 38, 8, 8)


def test_rounds_of_other_layers_are_refused(tmp_path, data, model, maps):
    cfg = Explanation(**{**CONFIG.model_dump(), "layer": "backbone.9", "hidden_by": RULE})
    with pytest.raises(DataError, match=r"same layer in all rounds; it has maps \(38, 8, 8\), this round \(38, 10, 10"):
        run(tmp_path, data, model, cfg, earlier=maps["maps"])
    with pytest.raises(ConfigError, match="--earlier: needed with `hidden_by`"):
        run(tmp_path, data, model, CONFIG, earlier=maps["maps"])


def test_other_classes_of_the_same_number_are_refused(tmp_path, data, model):
    summary = tmp_path / "split.json"
    summary.write_text('{"classes": ["c1", "c0"]}')
    with pytest.raises(CheckpointError, match=r"trained for the classes c0, c1, but .* has c1, c0"):
        run(tmp_path / "x", {**data, "summary": summary}, model)


def test_masks_are_of_the_images_as_they_were_explained(tmp_path, data, model, maps):
    cfg = masked().model_copy(update={"image": Image(size=28, resize=32, channels=1)})
    with pytest.raises(ConfigError, match="image: masks are of the images as the starting network is given them"):
        train(tmp_path, data, finetune, cfg, init=model, maps=maps["maps"])


def test_finetuning_refuses_maps_of_another_split(tmp_path, data, model, maps):
    content = load_file(maps["maps"])
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({name: value[5:].contiguous() for name, value in content.items()}, other)
    with pytest.raises(DataError, match="no saliency map for 5 of 34 training images"):
        train(tmp_path / "x", data, finetune, masked(), init=model, maps=other)
    with pytest.raises(ConfigError, match="--maps: needed with `mask_rule`"):
        train(tmp_path / "y", data, finetune, masked(), init=model)


def test_shards_are_of_one_model_only(tmp_path, data, model):
    run(tmp_path, data, model)
    (folder,) = (tmp_path / "work").iterdir()
    assert len(list(folder.iterdir())) == 1
    run(tmp_path, data, model, CONFIG.model_copy(update={"method": "gradcam"}))
    assert len(list((tmp_path / "work").iterdir())) == 2
    assert io.read_json(tmp_path / "record.json")["computed"] == 38
