"""From pixels to tensors, by hand and against torchvision."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from medmask.config.training import Augment, Image
from medmask.data.images import ImageReader, crop_box, eval_batches, fit_square, rotate, turn
from medmask.errors import ConfigError
from tests.toy import write_pack

PLAIN = {"mean": (0,), "std": (1,)}


def reader(folder, arrays, image=None, augment=None, seed=0):
    write_pack(folder, [np.asarray(array, dtype=np.uint8) for array in arrays])
    return ImageReader(folder / "images.npy", folder / "index.npy", image or Image(**PLAIN), augment, seed)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_channels_and_normalisation(tmp_path):
    grey, colour = np.full((2, 2, 1), 51), np.stack([np.full((2, 2), v) for v in (0, 51, 255)], axis=2)
    three = reader(tmp_path, [grey, grey], Image(channels=3, mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2))).batch(
        np.array([1])
    )
    assert three.dtype == torch.float32
    assert three[0, :, 0, 0].tolist() == pytest.approx([0.2, 0.0, -0.05])
    one = reader(tmp_path, [colour], Image(channels=1, **PLAIN)).batch(np.array([0]))
    assert one.shape == (1, 1, 2, 2)
    assert one[0, 0, 0, 0].item() == pytest.approx(102 / 255)


def test_published_normalisation_of_a_white_pixel(tmp_path):
    image = Image(mean=(0.485, 0.456, 0.406), std=(1, 1, 1))
    white = reader(tmp_path, [np.full((1, 1, 3), 255)], image).batch(np.array([0]))
    assert white.flatten().tolist() == pytest.approx([0.515, 0.544, 0.594])


def test_mixed_sizes_and_channels(tmp_path):
    arrays = [noise(6, 8, 3), noise(10, 5, 1), noise(4, 4, 3)]
    found = reader(tmp_path, arrays, Image(size=4, **PLAIN)).batch(np.arange(3))
    assert found.shape == (3, 3, 4, 4)
    assert torch.equal(found[2], torch.from_numpy(arrays[2]).permute(2, 0, 1) / 255)
    with pytest.raises(ConfigError, match=r"image.size: needed, since the images differ in size or colour: 10 x 5 x 1"):
        reader(tmp_path, arrays).batch(np.arange(3))


def test_resize_and_centre_crop_are_those_of_torchvision():
    images = torch.from_numpy(noise(2, 3, 9, 12))
    expected = functional.center_crop(functional.resize(images, [6], antialias=True), [4, 4])
    assert torch.equal(fit_square(images, 4, 6), expected)
    assert torch.equal(fit_square(images, 9, 9), images[..., 2:11])  # 1.5 columns are cut, rounded to even


def test_eval_batches_keep_the_order(tmp_path):
    arrays = [np.full((2, 2, 1), value) for value in range(7)]
    reader(tmp_path, arrays)
    positions = np.array([6, 0, 3, 2, 5])
    batches = list(
        eval_batches(tmp_path / "images.npy", tmp_path / "index.npy", positions, Image(channels=1, **PLAIN), 2)
    )
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert (torch.cat(batches)[:, 0, 0, 0] * 255).round().tolist() == positions.tolist()


def test_changes_are_a_function_of_seed_epoch_and_image(tmp_path):
    augment = Augment(flip=0.5, vertical_flip=0.5, rotate=30, crop_scale=(0.3, 1))
    arrays = [noise(12, 12, 1) for _ in range(1)] * 8
    one = reader(tmp_path, arrays, augment=augment)
    together = one.batch(np.arange(8), epoch=3)
    apart = torch.cat([one.batch(np.array([i]), epoch=3) for i in (7, 2)])
    assert torch.equal(together[[7, 2]], apart)
    assert not torch.equal(together, one.batch(np.arange(8), epoch=4))
    assert not torch.equal(together, reader(tmp_path, arrays, augment=augment, seed=1).batch(np.arange(8), epoch=3))
    assert torch.equal(one.batch(np.arange(8)), reader(tmp_path, arrays).batch(np.arange(8), epoch=3))
    assert len({image.numpy().tobytes() for image in together}) == 8


@pytest.mark.parametrize(("name", "axis"), [("flip", -1), ("vertical_flip", -2)])
def test_flips(tmp_path, name, axis):
    arrays = [noise(4, 6, 1)] * 400
    plain = reader(tmp_path, arrays).batch(np.array([0]))[0]
    always = reader(tmp_path, arrays, augment=Augment(**{name: 1})).batch(np.arange(400), epoch=0)
    assert (always == plain.flip(axis)).all()
    half = reader(tmp_path, arrays, augment=Augment(**{name: 0.25})).batch(np.arange(400), epoch=0)
    share = torch.stack([(image == plain.flip(axis)).all() for image in half]).float().mean()
    assert 0.19 < float(share) < 0.31  # 0.25 within three standard errors


def test_rotation_is_nearest_with_black_corners():
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3)
    quarter = rotate(image, torch.tensor([90.0]))[0, 0]
    assert quarter.tolist() == [[3, 6, 9], [2, 5, 8], [1, 4, 7]]  # counter-clockwise
    large = torch.full((2, 3, 16, 24), 200, dtype=torch.uint8)
    turned = rotate(large, torch.tensor([45.0, 0.0]))
    assert set(turned.unique().tolist()) == {0, 200}
    assert turned[0, 0, 0, 0] == 0
    assert torch.equal(turned[1], large[1])
    shape = torch.zeros(1, 1, 20, 40, dtype=torch.uint8)
    shape[..., 5:15, 10:30] = 255
    expected = functional.rotate(shape, 30.0)
    assert (rotate(shape, torch.tensor([30.0])) != expected).float().mean() < 0.01


def test_rotations_are_uniform(tmp_path):
    augment = Augment(rotate=10)
    draws = [np.random.default_rng([0, 1, i]).random(3)[2] for i in range(500)]
    assert abs(np.mean(draws) - 0.5) < 0.04
    assert reader(tmp_path, [noise(8, 8, 1)] * 2, augment=augment).batch(np.arange(2), epoch=1).shape == (2, 3, 8, 8)


def test_crops_stay_inside_and_have_the_asked_areas():
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(500):
        top, left, h, w = crop_box(30, 40, (0.2, 0.8), (0.75, 1.33), rng)
        assert 0 <= top <= top + h <= 30
        assert 0 <= left <= left + w <= 40
        assert 0.7 < w / h < 1.43
        areas.append(h * w / 1200)
    assert 0.17 < min(areas) < 0.25
    assert 0.6 < max(areas) < 0.84
    assert crop_box(10, 100, (1, 1), (0.75, 1.33), rng) == (
        0,
        43,
        10,
        13,
    )  # no whole area fits: the largest centred box


def test_crops_keep_the_packed_size_or_take_the_asked_one(tmp_path):
    augment = Augment(crop_scale=(0.5, 1))
    arrays = [noise(10, 10, 3)] * 2
    assert reader(tmp_path, arrays, augment=augment).batch(np.arange(2), epoch=0).shape == (2, 3, 10, 10)
    assert reader(tmp_path, arrays, Image(size=6), augment).batch(np.arange(2), epoch=0).shape == (2, 3, 6, 6)


def test_a_turned_image_is_cut_after_the_turn(tmp_path):
    """The published order: a box cut before the turn would show black corners more often."""
    augment = Augment(rotate=90, crop_scale=(0.2, 0.5))
    array = noise(40, 40, 3)
    got = reader(tmp_path, [array], Image(size=16, **PLAIN), augment, seed=3).batch(np.array([0]), epoch=5)
    rng = np.random.default_rng([3, 5, 0])
    turned = turn(torch.from_numpy(array).permute(2, 0, 1)[None], augment, [rng])[0]
    box = crop_box(40, 40, (0.2, 0.5), augment.crop_ratio, rng)
    assert torch.equal(got[0], functional.resized_crop(turned, *box, [16, 16], antialias=True) / 255)
