"""Packed pixels: what each kind of image becomes, and the file they stand in."""

import os
import pickle
import time
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medmask.data import pack
from medmask.data.pack import Pack, difference_hash, open_image, pack_image, write_pack
from medmask.data.tables import Source
from medmask.errors import DataError


def pixels(image):
    return pack_image(image, None).pixels


def saved(image, path, **options):
    image.save(path, **options)
    return open_image(path)


def test_grey_and_colour():
    assert pixels(Image.new("L", (3, 2), 7)).shape == (2, 3, 1)
    assert pixels(Image.new("RGB", (3, 2), (1, 2, 3)))[0, 0].tolist() == [1, 2, 3]
    assert pixels(Image.new("1", (1, 1), 1)).tolist() == [[[255]]]
    assert pixels(np.full((2, 3), 9, np.uint8)).tolist() == [[[9]] * 3] * 2
    assert pixels(Image.new("CMYK", (1, 1), (0, 0, 0, 255))).tolist() == [[[0, 0, 0]]]


def test_palette_becomes_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert pixels(saved(image, tmp_path / "p.png")).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_transparency_is_laid_on_black(tmp_path):
    assert pixels(saved(Image.new("RGBA", (1, 1), (200, 100, 50, 0)), tmp_path / "a.png")).tolist() == [[[0, 0, 0]]]
    half = pixels(Image.new("RGBA", (1, 1), (200, 100, 50, 128)))[0, 0]
    assert np.abs(half - np.array([100, 50, 25])).max() <= 1
    assert pixels(saved(Image.new("LA", (1, 1), (200, 255)), tmp_path / "b.png")).tolist() == [[[200]]]
    palette = Image.new("P", (1, 1))
    palette.putpalette([10, 20, 30])
    assert pixels(saved(palette, tmp_path / "c.png", transparency=0)).tolist() == [[[0, 0, 0]]]
    assert pixels(saved(Image.new("L", (1, 1), 5), tmp_path / "d.png", transparency=5)).tolist() == [[[0]]]


def test_sixteen_bits_are_scaled(tmp_path):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    assert pixels(saved(Image.fromarray(values), tmp_path / "d.png"))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert pixels(saved(Image.fromarray(values), tmp_path / "d.tif"))[0, :, 0].tolist() == [0, 1, 128, 255]
    with pytest.raises(ValueError, match=r"need values in 0\.\.65535, got -1\.\.0"):
        pixels(Image.fromarray(np.array([[-1, 0]], dtype=np.int32)))
    with pytest.raises(ValueError, match="floats"):
        pixels(Image.fromarray(np.zeros((1, 1), np.float32)))


@pytest.mark.parametrize(
    ("size", "result"), [((40, 20), (10, 20)), ((20, 45), (22, 10)), ((10, 10), (10, 10)), ((5, 6), (12, 10))]
)
def test_resize_shorter_side(size, result):
    assert pack_image(Image.new("RGB", size), 10).pixels.shape == (*result, 3)


def test_resize_is_antialiased():
    stripes = np.zeros((8, 64), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(pack_image(stripes, 2).pixels.astype(int) - 128).max() < 30  # without: 0 or 255


def test_hashes():
    ramp = np.tile(np.arange(0, 180, 10, dtype=np.uint8), (8, 1))
    assert difference_hash(Image.fromarray(ramp)) == "0" * 16  # darker than the right neighbour everywhere
    assert difference_hash(Image.fromarray(ramp[:, ::-1].copy())) == "f" * 16
    tall, wide = pack_image(np.zeros((4, 2), np.uint8), None), pack_image(np.zeros((2, 4), np.uint8), None)
    assert tall.sha256 != wide.sha256
    assert tall.sha256 == pack_image(Image.new("L", (2, 4)), None).sha256


def test_bad_files_are_named(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    for suffix in ("png", "jpg"):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-900])
        with pytest.raises(DataError, match=f"cut.{suffix}: cannot be read as an image"):
            open_image(path)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png: cannot be read as an image: UnidentifiedImageError"):
        open_image(tmp_path / "text.png")
    Image.new("L", (2, 2)).save(tmp_path / "two.tif", save_all=True, append_images=[Image.new("L", (2, 2))])
    with pytest.raises(DataError, match="need a single image, got a file of 2"):
        open_image(tmp_path / "two.tif")
    Image.new("L", (20, 20)).save(tmp_path / "large.png")
    monkeypatch.setattr(pack, "MAX_PIXELS", 399)
    with pytest.raises(DataError, match=r"large\.png: 20x20 pixels, more than 399"):
        open_image(tmp_path / "large.png")


def make_source(images):
    table = pd.DataFrame({"path": [f"{number}.png" for number in range(len(images))], "where": ""})

    def load(row):
        if isinstance(images[row], Exception):
            raise images[row]
        return images[row]

    return Source(table, (), load, {})


def test_pack_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (3, 4 + number % 2), dtype=np.uint8) for number in range(50)]
    facts = write_pack(make_source(images), tmp_path / "images.npy", tmp_path / "index.npy", None)
    packed = Pack.open(tmp_path / "images.npy", tmp_path / "index.npy")
    assert len(packed) == 50
    assert all((packed[number][..., 0] == image).all() for number, image in enumerate(images))
    assert facts["width"].tolist() == [4, 5] * 25
    assert packed.batch([48, 2]).tolist() == [images[48][..., None].tolist(), images[2][..., None].tolist()]
    with pytest.raises(ValueError, match="same shape"):
        packed.batch([0, 1])
    copy = pickle.loads(pickle.dumps(packed))
    assert (copy[7] == packed[7]).all()
    assert len(pickle.dumps(packed)) < 1000


def test_pack_of_one_size_is_a_block(tmp_path):
    images = [np.full((2, 2), number, np.uint8) for number in range(5)]
    write_pack(make_source(images), tmp_path / "images.npy", tmp_path / "index.npy", None)
    batch = Pack.open(tmp_path / "images.npy", tmp_path / "index.npy").batch(np.array([4, 0]))
    assert batch.shape == (2, 2, 2, 1)
    assert batch[:, 0, 0, 0].tolist() == [4, 0]


def test_all_bad_images_are_listed(tmp_path):
    images = [np.zeros((1, 1), np.uint8), DataError("b.png: cut"), ValueError("floats"), np.zeros((1, 1), np.uint8)]
    with pytest.raises(DataError, match=r"2 problems:\n  b\.png: cut\n  2\.png: floats"):
        write_pack(make_source(images), tmp_path / "images.npy", tmp_path / "index.npy", None)


def test_threads_run_few_rows_ahead():
    done = []
    results = pack.in_order(lambda row: done.append(row) or str(row), range(2000))
    assert next(results) == "0"
    time.sleep(0.05)
    assert len(done) <= 4 * (os.cpu_count() or 1) + 1
    assert list(results) == [str(row) for row in range(1, 2000)]


def test_packing_holds_few_images_in_memory(tmp_path):
    source = make_source([None] * 200)
    big = Source(source.table, (), lambda row: np.full((500, 500), row, np.uint8), {})
    tracemalloc.start()
    write_pack(big, tmp_path / "images.npy", tmp_path / "index.npy", None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "images.npy").stat().st_size > 50e6
    assert peak < 25e6


def test_files_that_do_not_belong_together(tmp_path):
    for name, count in (("a", 2), ("b", 3)):
        write_pack(
            make_source([np.zeros((2, 2), np.uint8)] * count), tmp_path / f"{name}.npy", tmp_path / f"{name}i.npy", None
        )
    with pytest.raises(DataError, match="does not belong to"):
        Pack.open(tmp_path / "a.npy", tmp_path / "bi.npy")
    (tmp_path / "empty.npy").touch()
    for name in ("gone", "empty"):
        with pytest.raises(DataError, match="no packed images"):
            Pack.open(tmp_path / f"{name}.npy", tmp_path / "bi.npy")
