"""Decoded images in one file: every pixel of a dataset as uint8, one image after the other, and an index.

What an image file can hold is decided here, once: palettes become colour, transparency is laid on black, 16 bits are
scaled to 8, one-bit images become black and white, other colour spaces become RGB; grey stays one channel. The EXIF
orientation is not applied, as in torchvision.
"""

import hashlib
import logging
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from rich.console import Console
from rich.progress import track

from medmask.data.tables import Source, inside, refuse
from medmask.errors import DataError

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".jp2"))
MAX_PIXELS = 2**26  # 67 million: larger than any camera's or scanner's plain image, small enough to decode in memory
Pixels = np.ndarray  # (H, W, C) uint8, C is 1 or 3


@dataclass(frozen=True)
class Packed:
    """One decoded image, and what the manifest says of it."""

    pixels: Pixels
    sha256: str
    phash: str


def load_image(root: Path, relative: str) -> Image.Image:
    """Decode an image file in the resolved folder `root`; no path or link leads out of it."""
    return open_image(inside(root, relative))


def open_image(path: Path) -> Image.Image:
    """Decode an image file whole; a DataError names it when it is too large, truncated or no image."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path}: {image.width}x{image.height} pixels, more than {MAX_PIXELS:,} are refused")
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise DataError(f"{path}: need a single image, got a file of {image.n_frames}")  # type: ignore[attr-defined]
            image.load()
            return image
    except DataError:
        raise
    except Exception as error:  # decoders of untrusted bytes raise nearly anything
        raise DataError(f"{path}: cannot be read as an image: {type(error).__name__}: {error!s}") from error


def to_uint8(image: Image.Image | np.ndarray) -> Image.Image:
    """The same picture in mode L or RGB, by the rules at the top of this file.

    Raises
    ------
    ValueError : an image of floats, or of integers beyond 16 bits, which have no fixed black and white.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"need values in 0..65535, got {values.min()}..{values.max()}")
        return Image.fromarray(((values * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("need whole numbers for pixels, got floats")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert(mode)


def resize_shorter(image: Image.Image, size: int | None) -> Image.Image:
    """Bilinear, with antialiasing, to `size` pixels on the shorter side; the longer side is rounded down."""
    shorter = min(image.size)
    if size is None or size == shorter:
        return image
    width, height = (max(1, side * size // shorter) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def difference_hash(image: Image.Image) -> str:
    """16 hex digits; each bit says whether one of 8x8 cells is brighter than its right neighbour."""
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR))
    return np.packbits(cells[:, :-1] > cells[:, 1:]).tobytes().hex()


def pixel_digest(pixels: Pixels) -> str:
    """sha256 of shape and bytes; equal for equal pictures whatever the format of their files."""
    return hashlib.sha256(",".join(map(str, pixels.shape)).encode() + b";" + pixels.tobytes()).hexdigest()


def pack_image(image: Image.Image | np.ndarray, resize: int | None) -> Packed:
    """Decode by the rules, resize, and hash."""
    plain = resize_shorter(to_uint8(image), resize)
    pixels = np.atleast_3d(np.asarray(plain))  # (H, W) -> (H, W, 1)
    return Packed(pixels, pixel_digest(pixels), difference_hash(plain))


def write_pack(source: Source, images: Path, index: Path, resize: int | None) -> pd.DataFrame:
    """Write all images of a source, holding only a few in memory.

    Returns
    -------
    DataFrame indexed as `source.table`: sha256, width, height, phash.

    Raises
    ------
    DataError : lists what is wrong with the source's tables, and every image that cannot be read.
    """

    def pack(row: int) -> Packed | str:
        try:
            return pack_image(source.load(row), resize)
        except DataError as error:
            problem = str(error)
        except ValueError as error:
            problem = f"{source.table['path'][row]}: {error}"
        where = source.table["where"][row]
        return f"{where}: {problem}" if where else problem

    facts, places, problems, offset = [], [], [*source.problems], 0
    with images.open("wb") as file, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        write_header(file, 0)
        for packed in with_progress(in_order(pack, list(source.table.index)), len(source.table), "packing images"):
            if isinstance(packed, str):
                problems.append(packed)
                continue
            height, width, channels = packed.pixels.shape
            file.write(packed.pixels.tobytes())
            facts.append((packed.sha256, width, height, packed.phash))
            places.append((offset, height, width, channels))
            offset += packed.pixels.size
        refuse("dataset", list(dict.fromkeys(problems)))  # with cues, an image is read twice
        file.seek(0)
        write_header(file, offset)
    np.save(index, np.array(places, dtype=np.int64).reshape(-1, 4))
    return pd.DataFrame(facts, columns=["sha256", "width", "height", "phash"], index=source.table.index)


def write_header(file, size: int) -> None:
    """The .npy header of `size` bytes; numpy pads it, so that its length is the same for any size."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (size,)})


def in_order(work: Callable[[int], Packed | str], rows: Sequence[int]) -> Iterator[Packed | str]:
    """Results of `work` in the order of `rows`, made by threads that run a few rows ahead."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[Future[Packed | str]] = deque()
    with ThreadPoolExecutor(cores) as pool:
        for row in rows:
            waiting.append(pool.submit(work, row))
            if len(waiting) > 4 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def with_progress(items: Iterator[Packed | str], total: int, text: str) -> Iterator[Packed | str]:
    """The items, with a bar on a terminal and a plain line each tenth of the way elsewhere."""
    if sys.stderr.isatty():
        yield from track(items, text, total, console=Console(stderr=True), transient=True)
        return
    step = max(1000, -(-total // 10))
    for done, item in enumerate(items, start=1):
        yield item
        if done % step == 0:
            log.info("%s: %d of %d", text, done, total)


@dataclass(frozen=True)
class Pack:
    """The packed images of a dataset, read from the disk as they are asked for. Pickles as two file names.

    Attributes
    ----------
    files : images and index file.
    pixels : uint8, 1-D, memory-mapped.
    index : (N, 4) int64: offset, height, width, channels.
    """

    files: tuple[Path, Path]
    pixels: np.ndarray
    index: np.ndarray

    @classmethod
    def open(cls, images: Path, index: Path) -> "Pack":
        """Map the two files; a DataError when they do not belong together."""
        try:
            pixels, places = np.load(images, mmap_mode="r"), np.load(index)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{images}, {index}: no packed images: {error}") from error
        if places.ndim != 2 or places.shape[1] != 4 or places[:, 1:].prod(axis=1).sum() != pixels.size:
            raise DataError(f"{index}: does not belong to {images}: its sizes do not sum to {pixels.size} bytes")
        return cls((images, index), pixels, places)

    def __reduce__(self):
        return Pack.open, self.files  # a memory map would pickle as all its pixels

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> Pixels:
        offset, height, width, channels = map(int, self.index[position])
        return np.asarray(self.pixels[offset : offset + height * width * channels]).reshape(height, width, channels)

    @cached_property
    def block(self) -> np.ndarray | None:
        """All images as one (N, H, W, C) array when they are of one size, else None."""
        shape = self.index[0, 1:]
        return np.asarray(self.pixels).reshape(-1, *shape) if (self.index[:, 1:] == shape).all() else None

    def batch(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Copy of some images as (n, H, W, C); ValueError when they differ in size."""
        if self.block is not None:
            return self.block[np.asarray(positions, dtype=np.int64)]
        return np.stack([self[position] for position in positions])
