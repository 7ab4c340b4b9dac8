"""A spurious cue: drawn into a copy of each image, and given to the images of each class at its rate.

The pack of a dataset with a shortcut holds every image twice: image i without its cue at position i, with it at n + i.
A split then names one of the two rows of a training image, and the test sets share the rows of the test images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from medmask.config.data import Shortcut
from medmask.data.pack import Pixels, resize_shorter, to_uint8
from medmask.data.tables import Source
from medmask.errors import ConfigError, lookup

HALF = 127  # of 255
TEST_SETS = ("raw", "bias_conflicting", "bias_aligned")


def with_cues(source: Source, shortcut: Shortcut, resize: int | None) -> Source:
    """All images in RGB, then all once more with the cue; a cue is as large as it is told, whatever `resize` is.

    Raises
    ------
    ConfigError : when loaded, a cue that is larger than its image.
    """
    n = len(source.table)
    rows = list(source.table.index)
    plain = source.table.set_axis(range(n))
    cued = plain.assign(image_id=plain["image_id"] + "~cue").set_axis(range(n, 2 * n))

    def load(row: int) -> Pixels:
        image = to_uint8(source.load(rows[row % n]))
        pixels = np.array(resize_shorter(image.convert("RGB"), resize))
        return pixels if row < n else draw_cue(pixels, shortcut, row - n)

    return replace(source, table=pd.concat([plain, cued]), load=load)


def with_all_rates(shortcut: Shortcut, classes: Sequence[str]) -> Shortcut:
    """The same with a rate for each class, 0 where none is named.

    Raises
    ------
    ConfigError : `rate` names an unknown class, or is the same for all.
    """
    for name in shortcut.rate:
        lookup(dict.fromkeys(classes), name, "data.shortcut.rate")
    rates = {name: shortcut.rate.get(name, 0.0) for name in classes}
    if len({*rates.values()}) < 2:
        raise ConfigError(f"data.shortcut.rate: need rates that differ between classes, got {rates}")
    return shortcut.model_copy(update={"rate": rates})


def draw_cue(pixels: Pixels, shortcut: Shortcut, number: int) -> Pixels:
    """A copy of an RGB image with the cue; `number` names the draw of a random place."""
    if shortcut.kind in ("background", "foreground"):  # as aliasgharkhani/Masktune names them
        is_bright = pixels.max(axis=2, keepdims=True) > HALF
        return np.where(is_bright == (shortcut.kind == "foreground"), np.array(shortcut.colour, dtype=np.uint8), pixels)
    height, width = pixels.shape[:2]
    side = shortcut.size + 2 * shortcut.margin
    if side > min(height, width):
        what = f"{shortcut.size} pixels" + (f" and its margins of {shortcut.margin}" if shortcut.margin else "")
        raise ConfigError(f"data.shortcut.size: the cue of {what} is larger than image {number} ({width} x {height})")
    changed, area = pixels.copy(), cue_area(shortcut, height, width, number)
    if shortcut.second:  # as aliasgharkhani/Masktune has it
        if 2 * (shortcut.size + shortcut.margin) > width:
            raise ConfigError(
                f"data.shortcut.second: two cues of {shortcut.size} pixels, {shortcut.margin} from the edges, do not "
                f"fit side by side into image {number} ({width} x {height})"
            )
        changed[area[:, ::-1]] = shortcut.colour[::-1]
    changed[area] = shortcut.colour
    return changed


def cue_area(shortcut: Shortcut, height: int, width: int, number: int = 0) -> np.ndarray:
    """Pixels that the cue covers, (H, W) bool."""
    size, area = shortcut.size, np.zeros((height, width), dtype=bool)
    edge = shortcut.margin
    top, left = (edge + x for x in corner(shortcut, height - size - 2 * edge, width - size - 2 * edge, number))
    if shortcut.kind == "rectangle":
        area[top : top + size, left : left + size] = True
    elif shortcut.kind == "disc":
        y, x = np.ogrid[:size, :size]
        middle = (size - 1) / 2
        area[top : top + size, left : left + size] = (y - middle) ** 2 + (x - middle) ** 2 <= (size / 2) ** 2
    else:  # a ruler: ticks across the whole width, every second one half as long, with a thin line at their foot
        step, line = max(2, size // 2), max(1, size // 8)
        foot = top if shortcut.place.startswith("top") else top + size - line
        area[foot : foot + line] = True
        for i, x0 in enumerate(range(0, width, step)):
            length = size if i % 2 == 0 else max(1, size // 2)
            start = top if shortcut.place.startswith("top") else top + size - length
            area[start : start + length, x0 : x0 + line] = True
    return area


def corner(shortcut: Shortcut, low: int, right: int, number: int) -> tuple[int, int]:
    """Top and left of a cue that can be moved down by `low` and to the right by `right` pixels."""
    if shortcut.place == "random":
        rng = np.random.default_rng([shortcut.seed, *b"place", number])
        return int(rng.integers(low + 1)), int(rng.integers(right + 1))
    if shortcut.place == "centre":
        return low // 2, right // 2
    vertical, horizontal = shortcut.place.split("_")
    return (0 if vertical == "top" else low), (0 if horizontal == "left" else right)


def place_cues(rows: pd.DataFrame, about: Mapping[str, Any], n: int) -> pd.DataFrame:
    """Choose the row of the pack of each image of a split, and make the three test sets.

    Parameters
    ----------
    rows : a split's rows, whose `position` is that of the image without its cue.
    about : the settings of the shortcut, as dataset.json has them.
    n : images of the dataset; the row of an image with its cue is `n` further on.

    Returns
    -------
    DataFrame with the column `has_cue`. Images that are not in the test set carry the cue at the rate of their class.
    The test images stand there once for each test set: `raw` without the cue; `bias_aligned` with it where the class
    has it often in training, else without; `bias_conflicting` the other way round. The ids of the latter two end in
    `~` and the test set. `sha256` stays that of the image without the cue, so that a leak shows whatever the cue.
    """
    shortcut = Shortcut(**about)
    is_test = rows["side"] == "test"
    fitted = rows[~is_test].copy()
    fitted["has_cue"] = draw_carriers(fitted, shortcut)
    parts = [fitted]
    for name in TEST_SETS:
        part = rows[is_test].assign(test_set=name, has_cue=0)
        often = part["class_name"].map(shortcut.is_frequent).astype(int)
        if name != "raw":
            part["has_cue"] = often if name == "bias_aligned" else 1 - often
            part["image_id"] += f"~{name}"
        parts.append(part)
    placed = pd.concat(parts, ignore_index=True)
    placed["position"] += n * placed["has_cue"]
    return placed


def draw_carriers(rows: pd.DataFrame, shortcut: Shortcut) -> pd.Series:
    """Which rows carry the cue, 0 or 1: by class, in the order of the pack, whatever side they are on."""
    has_cue = pd.Series(0, index=rows.index)
    for label in sorted(set(rows["label"])):
        part = rows[rows["label"] == label].sort_values("position")
        rate = shortcut.rate.get(part["class_name"].iloc[0], 0.0)
        rng = np.random.default_rng([shortcut.seed, *b"shortcut", label])
        if shortcut.draw == "each":
            chosen = rng.random(len(part)) < rate
            has_cue[part.index[chosen]] = 1
        else:
            order = np.arange(len(part)) if shortcut.draw == "first" else rng.permutation(len(part))
            has_cue[part.index[order[: round(len(part) * rate)]]] = 1
    return has_cue
