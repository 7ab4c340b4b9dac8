"""Masks by hand: rules, resolutions, edges, random places, and whose images they are."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from medmask.config.finetuning import MaskRule
from medmask.config.load import load_config
from medmask.config.training import Augment, Image
from medmask.data.images import ImageReader
from medmask.errors import ConfigError, DataError
from medmask.saliency.masks import Masks, cutouts, hide_salient, shifted
from tests.test_config import small
from tests.toy import write_pack

MAPS = torch.tensor([[[0.0, 0.25], [0.5, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])


@pytest.fixture
def file(tmp_path):
    save_file({"maps": MAPS.half(), "positions": torch.tensor([4, 2])}, tmp_path / "maps.safetensors")
    return tmp_path / "maps.safetensors"


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({"kind": "threshold", "strength": 0.25}, [1, 1, 0, 0]),
        ({"kind": "threshold", "strength": 1.0}, [1, 1, 1, 1]),
        ({"kind": "top_k", "strength": 0.25}, [1, 1, 1, 0]),
        ({"kind": "top_k", "strength": 0.0}, [1, 1, 1, 1]),
        ({"kind": "mean", "strength": 1.0}, [1, 1, 0, 0]),
        ({"kind": "mean", "strength": 0.5}, [1, 0, 0, 0]),
    ],
)
def test_rules(rule, kept):
    masks = hide_salient(MAPS, MaskRule(**rule), 2, 2)
    assert masks[0].flatten().tolist() == kept
    assert masks[1].flatten().tolist() == [1] * 4  # an empty map keeps everything
    assert masks.shape == (2, 1, 2, 2)


def test_an_empty_map_keeps_everything_at_strength_zero():
    for kind in ("threshold", "top_k", "mean", "official", "random"):
        assert hide_salient(MAPS[1:], MaskRule(kind=kind, strength=0), 4, 4).min() == 1


def test_edges_and_resolution():
    rule = {"kind": "top_k", "strength": 0.25}
    hard = hide_salient(MAPS[:1], MaskRule(**rule), 4, 4)[0, 0]
    assert hard.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    soft = hide_salient(MAPS[:1], MaskRule(**rule, edges="soft"), 4, 4)[0, 0]
    assert soft[3, 3] == 0
    assert soft[2, 2] == pytest.approx(1 - 0.75**2)
    fine = hide_salient(MAPS[:1], MaskRule(**rule, resolution="image"), 4, 4)[0, 0]
    assert set(fine.unique().tolist()) == {0, 1}
    assert int((fine == 0).sum()) == 4


def test_random_masks_have_the_area_of_top_k_elsewhere():
    maps = torch.rand(50, 8, 8)
    moved = shifted(maps, np.arange(50), seed=0)
    assert torch.equal(maps.flatten(1).sort().values, moved.flatten(1).sort().values)
    assert torch.equal(moved, shifted(maps, np.arange(50), seed=0))
    assert not torch.equal(moved, shifted(maps, np.arange(50), seed=1))
    assert torch.equal(moved[10:20], shifted(maps[10:20], np.arange(10, 20), seed=0))
    places = {tuple(divmod(int(m.argmax()) - int(s.argmax()), 8)) for m, s in zip(moved, maps, strict=True)}
    assert len(places) > 20
    first = moved[0]
    assert any(torch.equal(first, maps[0].roll((a, b), (0, 1))) for a in range(8) for b in range(8))


def test_a_cutout_is_one_square_of_a_side_between_2_and_14_of_28_pixels():
    masks = cutouts(np.arange(300), 28, 28, seed=0)
    assert set(masks.unique().tolist()) == {0, 1}
    hidden = [np.argwhere(mask[0].numpy() == 0) for mask in masks]
    spans = [tuple(places.max(0) - places.min(0) + 1) for places in hidden]
    assert all(
        height == width and len(places) == height**2 for (height, width), places in zip(spans, hidden, strict=True)
    )
    assert {height for height, _ in spans} == set(range(2, 15))
    assert len({tuple(places[0]) for places in hidden}) > 150
    assert torch.equal(masks[5:9], cutouts(np.arange(5, 9), 28, 28, seed=0))
    assert not torch.equal(masks, cutouts(np.arange(300), 28, 28, seed=1))
    assert cutouts(np.arange(20), 3, 5, seed=0).flatten(1).amin(1).max() == 0  # a square of one pixel at least


def test_cutouts_hide_parts_of_the_masked_images_alone(file):
    masks = Masks(file, MaskRule(kind="cutout"), np.array([4]), seed=0)
    found = masks(np.array([2, 4]), 28, 28)
    assert found[0].min() == 1
    assert found[1].min() == 0
    assert masks.notes() == ["masks (cutout) hide one square in each of 1 training images"]


def test_masks_belong_to_images(file):
    masks = Masks(file, MaskRule(kind="top_k", strength=0.25), np.array([4, 2]), seed=0)
    found = masks(np.array([2, 4, 9, 0]), 2, 2)
    assert found[1].flatten().tolist() == [1, 1, 1, 0]
    assert found[[0, 2, 3]].min() == 1  # an empty map, and images that are not masked
    assert masks.notes() == [
        "masks (top_k 0.25) hide 12.5% of the cells of 2 training images",
        "1 saliency maps are all zero: these images are kept whole",
    ]
    only = Masks(file, MaskRule(kind="top_k", strength=0.25), np.array([2]), seed=0)
    assert only(np.array([4]), 2, 2).min() == 1  # has a map, but is not trained on


def test_an_image_is_kept_whole_where_the_maps_of_all_rounds_are_zero(tmp_path):
    tensors = {"maps": MAPS.half(), "earlier": MAPS.flip(0)[None].half(), "positions": torch.tensor([4, 2])}
    save_file(tensors, tmp_path / "maps.safetensors")
    rule = MaskRule(kind="top_k", strength=0.25, cumulative=True)
    masks = Masks(tmp_path / "maps.safetensors", rule, np.array([4, 2]), seed=0)
    assert masks.notes() == ["masks (top_k 0.25) hide 25.0% of the cells of 2 training images"]
    assert masks(np.array([2, 4]), 2, 2).flatten(1).tolist() == [[1, 1, 1, 0]] * 2


def test_maps_of_another_dataset_are_refused(tmp_path):
    file = tmp_path / "maps.safetensors"
    save_file({"maps": MAPS.half(), "positions": torch.tensor([4, 2]), "images": torch.tensor([40, 20])}, file)
    rule = MaskRule(kind="top_k")
    Masks(file, rule, np.array([2]), 0, np.array([10, 20]))
    with pytest.raises(DataError, match="of other images than the training's; it is of another dataset"):
        Masks(file, rule, np.array([2, 4]), 0, np.array([10, 20]))


def test_maps_of_another_split_are_refused(file):
    with pytest.raises(DataError, match=r"no saliency map for 2 of 3 .*\(first: position 5\).*another split"):
        Masks(file, MaskRule(kind="top_k"), np.array([4, 5, 7]), seed=0)
    file.write_bytes(b"x")
    with pytest.raises(DataError, match="cannot be read as saliency maps"):
        Masks(file, MaskRule(kind="top_k"), np.array([4]), seed=0)


@pytest.mark.parametrize(
    "rule", [{"strength": 1.5}, {"strength": -0.1}, {"resolution": "image", "edges": "soft"}, {"kind": "other"}]
)
def test_rules_out_of_range(rule):
    with pytest.raises(ValidationError):
        MaskRule(**{"kind": "threshold", **rule})


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"mask_rule": {"kind": "threshold", "strength": 1.5}},
            "finetunings.later.mask_rule.strength: need less than or equal to 1, got 1.5",
        ),
        ({"mask_rule": {"kind": "thresh"}}, "finetunings.later.mask_rule.kind: need "),
        ({"augment": {"crop_scale": [0.5, 1.0]}}, "finetunings.later.augment.crop_scale: masks are of the image as"),
    ],
)
def test_bad_settings_are_one_line(block, message):
    raw = small()
    raw["masks"] = {"x": {"method": "xgradcam"}}
    raw["finetunings"]["later"] |= {"masks": "x", "mask_rule": {"kind": "top_k"}, **block}
    with pytest.raises(ConfigError) as error:
        load_config(raw)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_masked_pixels_are_black_before_normalisation_and_turn_with_the_image(tmp_path, file):
    write_pack(tmp_path, [np.full((2, 2, 1), 255, dtype=np.uint8) for _ in range(6)])
    masks = Masks(file, MaskRule(kind="top_k", strength=0.25), np.array([4]), seed=0)
    image = Image(channels=3, mean=(0.5,), std=(0.25,))
    reader = ImageReader(tmp_path / "images.npy", tmp_path / "index.npy", image, masks=masks)
    batch = reader.batch(np.array([4, 2]))
    assert batch.shape == (2, 3, 2, 2)
    assert batch[0, 1].flatten().tolist() == [2, 2, 2, -2]
    assert batch[1].min() == 2
    flipped = ImageReader(tmp_path / "images.npy", tmp_path / "index.npy", image, Augment(flip=1.0), masks=masks)
    assert flipped.batch(np.array([4]), 0)[0, 0].flatten().tolist() == [2, 2, -2, 2]
