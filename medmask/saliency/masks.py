"""From saliency maps to masks: 1 keeps a place, 0 hides it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from medmask.config.finetuning import MaskRule
from medmask.errors import DataError
from medmask.saliency.maps import resized


def threshold(maps: Tensor, strength: float) -> Tensor:
    """Hide what is above `strength`."""
    return maps > strength


def top_k(maps: Tensor, strength: float) -> Tensor:
    """Hide what is above the percentile 100 * (1 - strength) of its map, interpolated as numpy does."""
    return maps > torch.quantile(maps.flatten(1), 1 - strength, dim=1)[:, None, None]


def mean(maps: Tensor, strength: float) -> Tensor:
    """Hide what is above `strength` times the mean of its map."""
    return maps > strength * maps.mean((1, 2), keepdim=True)


def official(maps: Tensor, strength: float) -> Tensor:
    """Hide what is above mean + 2 sd, population sd, of the positive values of its map; `strength` is not used.

    Of five values or fewer none lies above; with five it may equal the sum, and rounding must not decide.
    """
    positive = maps > 0
    count = positive.sum((1, 2), keepdim=True).clamp(min=1)
    middle = maps.sum((1, 2), keepdim=True) / count
    variance = ((maps - middle) ** 2 * positive).sum((1, 2), keepdim=True) / count
    return (maps > middle + 2 * variance.sqrt()) & (count > 5)


RULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "threshold": threshold,
    "top_k": top_k,
    "mean": mean,
    "official": official,
    "random": top_k,  # of maps that have been shifted
}
CUTOUT = (1 / 14, 1 / 2)  # sides of a square, as shares of the image's: 2 to 14 of 28 pixels


def hide_salient(maps: Tensor, rule: MaskRule, height: int, width: int) -> Tensor:
    """Masks (N, 1, H, W) float32 in [0, 1] from maps (N, h, w) in [0, 1]; a map that is all zero keeps everything.

    Sources: vmazashvili's notebook (threshold, top_k, mean; binary maps resized bilinearly) and aliasgharkhani/Masktune
    (official; maps resized bilinearly).
    """
    if rule.resolution == "image":
        maps = resized(maps, height, width)
    keep = 1 - RULES[rule.kind](maps, rule.strength).float()[:, None]
    if keep.shape[2:] == (height, width):
        return keep
    mode = "bilinear" if rule.edges == "soft" else "nearest-exact"
    return functional.interpolate(keep, (height, width), mode=mode)


def shifted(maps: Tensor, positions: np.ndarray, seed: int) -> Tensor:
    """Each map moved round by random steps down and right: the same area and shape elsewhere, drawn by image."""
    height, width = maps.shape[1:]
    draws = [np.random.default_rng([seed, *b"mask", int(position)]).integers((height, width)) for position in positions]
    down, right = torch.from_numpy(np.array(draws)).T[:, :, None]
    rows = (torch.arange(height) - down) % height  # (N, h)
    columns = (torch.arange(width) - right) % width
    return maps[torch.arange(len(maps))[:, None, None], rows[:, :, None], columns[:, None, :]]


def cutouts(positions: np.ndarray, height: int, width: int, seed: int) -> Tensor:
    """Masks (N, 1, H, W) that hide one square each, its side and place drawn by image, wholly within the image.

    Source: aliasgharkhani/Masktune, its random masking.
    """
    masks = torch.ones(len(positions), 1, height, width)
    least, most = (max(1, round(share * min(height, width))) for share in CUTOUT)
    for mask, position in zip(masks, positions, strict=True):
        rng = np.random.default_rng([seed, *b"cutout", int(position)])
        side = int(rng.integers(least, most + 1))
        top, left = rng.integers((height - side + 1, width - side + 1))
        mask[0, top : top + side, left : left + side] = 0
    return masks


class Masks:
    """The masks of the images that a training hides parts of; any other image is kept whole.

    Parameters
    ----------
    file : what the stage mask has written. positions : (n,) the images to hide parts of, in the pack.
    seed : names the draws of the rule `random`. digests : (m,) int64, of the pixels of these images and of any others,
        as `data.tables.short_digests` has them; None: not compared.

    Raises
    ------
    DataError : the file has no map for some of the images, is of others, or cannot be read.
    """

    def __init__(
        self, file: Path, rule: MaskRule, positions: np.ndarray, seed: int, digests: np.ndarray | None = None
    ) -> None:
        self.rule, self.seed = rule, seed
        self.rounds, places, images = read_maps(file)
        missing = positions[~np.isin(positions, places)]
        if len(missing):
            raise DataError(
                f"{file}: has no saliency map for {len(missing)} of {len(positions)} training images (first: position "
                f"{missing[0]}); it belongs to another split"
            )
        self.row_of = np.full(int(places.max()) + 2, -1)
        order = np.isin(places, positions)
        if images is not None and digests is not None and not np.isin(images[order], digests).all():
            raise DataError(
                f"{file}: its saliency maps are of other images than the training's; it is of another dataset"
            )
        self.row_of[places[order]] = np.flatnonzero(order)

    def __call__(self, positions: np.ndarray, height: int, width: int) -> Tensor:
        """Masks (N, 1, H, W) float32 of the images at these positions."""
        rows = self.row_of[np.minimum(positions, len(self.row_of) - 1)]  # the last one is no image
        known = np.flatnonzero(rows >= 0)
        masks = torch.ones(len(positions), 1, height, width)
        if self.rule.kind == "cutout":
            masks[torch.from_numpy(known)] = cutouts(positions[known], height, width, self.seed)
        elif len(known):
            for maps in self.rounds[:, torch.from_numpy(rows[known])].float():
                moved = shifted(maps, positions[known], self.seed) if self.rule.kind == "random" else maps
                masks[torch.from_numpy(known)] *= hide_salient(moved, self.rule, height, width)
        return masks

    def notes(self) -> list[str]:
        """Sentences for the record: how much is hidden, and maps that hide nothing."""
        if self.rule.kind == "cutout":
            return [f"masks (cutout) hide one square in each of {int((self.row_of >= 0).sum())} training images"]
        used = self.rounds[:, torch.from_numpy(self.row_of[self.row_of >= 0])]
        empty = int((used.flatten(2).amax((0, 2)) == 0).sum())
        height, width = used.shape[2:]
        rule = self.rule.model_copy(update={"resolution": "map"})

        def kept(part: Tensor) -> float:
            """Cells of some images, (rounds, N, h, w), that no round hides."""
            return float(torch.stack([hide_salient(maps.float(), rule, height, width) for maps in part]).prod(0).sum())

        share = 1 - sum(map(kept, used.split(4096, dim=1))) / used[-1].numel()
        what = self.rule.kind + ("" if self.rule.kind == "official" else f" {self.rule.strength:g}")
        notes = [f"masks ({what}) hide {share:.1%} of the cells of {used.shape[1]} training images"]
        return notes + [f"{empty} saliency maps are all zero: these images are kept whole"] * (empty > 0)


class SavedMaps(NamedTuple):
    """What the stage mask has written; there is more than one round where masks are cumulative.

    rounds : (rounds, n, h, w) float16, the newest last. positions : (n,) int64, of the images in the pack.
    images : (n,) int64, digests of their pixels; None in files of older versions.
    """

    rounds: Tensor
    positions: np.ndarray
    images: np.ndarray | None


def read_maps(file: Path) -> SavedMaps:
    """Read saliency maps; DataError where they are none."""
    try:
        with safe_open(file, framework="pt") as content:
            maps, positions = content.get_tensor("maps")[None], content.get_tensor("positions").numpy()
            names = content.keys()
            if "earlier" in names:
                maps = torch.cat([content.get_tensor("earlier"), maps])
            images = content.get_tensor("images").numpy() if "images" in names else None
    except (SafetensorError, OSError, RuntimeError) as error:
        raise DataError(f"{file}: cannot be read as saliency maps: {error}") from error
    if maps.dim() != 4 or maps.shape[1] != len(positions):
        raise DataError(
            f"{file}: need maps (n, h, w) and as many positions, got {tuple(maps.shape[1:])}, {len(positions)}"
        )
    return SavedMaps(maps, positions, images)
