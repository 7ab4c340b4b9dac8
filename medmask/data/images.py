"""From packed pixels to the tensors that a network sees; random changes depend on (seed, epoch, image) alone."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medmask.config.training import Augment, Image
from medmask.data.pack import Pack
from medmask.errors import ConfigError

CROP_TRIES = 10


class ImageReader:
    """Reads rows of a pack as float32 batches.

    Parameters
    ----------
    augment : random changes, made when `batch` is given an epoch; None makes none.
    seed : names the random draws together with the epoch and the image's position.
    masks : (positions, H, W) -> (N, 1, H, W) in [0, 1], 0 hides: what pixels are multiplied by before random changes.
    """

    def __init__(
        self, images: Path, index: Path, image: Image, augment: Augment | None = None, seed: int = 0,
        masks: Callable[[np.ndarray, int, int], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.pack = Pack.open(images, index)
        self.image = image
        self.augment = augment if augment is not None and changes_images(augment) else None
        self.seed = seed
        self.masks = masks
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (image.mean, image.std))

    def batch(self, positions: np.ndarray, epoch: int | tuple[int, ...] | None = None) -> Tensor:
        """Read images; (N,) positions in the pack to (N, C, H, W) float32.

        With an epoch, or other numbers that name the draw: changed at random.
        """
        if self.augment is None or epoch is None:
            return self.normalised(self.pixels(positions))
        named = [self.seed, *((epoch,) if isinstance(epoch, int) else epoch)]
        draws = [np.random.default_rng([*named, int(position)]) for position in positions]
        if self.augment.crop_scale is None:
            return self.normalised(turn(self.pixels(positions), self.augment, draws))
        crops = [self.random_crop(position, rng) for position, rng in zip(positions, draws, strict=True)]
        return self.normalised(torch.stack(crops))

    def pixels(self, positions: np.ndarray) -> Tensor:
        """What the network sees, before random changes: (N, C, H, W) uint8, or float32 in 0..255 with masks."""
        whole = self.unmasked(positions)
        return whole if self.masks is None else whole * self.masks(positions, *whole.shape[2:])

    def unmasked(self, positions: np.ndarray) -> Tensor:
        """Resized and cropped at the centre, (N, C, H, W) uint8."""
        sizes = self.pack.index[positions, 1:]  # (N, 3) height, width, channels
        if (sizes == sizes[0]).all():
            return self.fitted(torch.from_numpy(self.pack.batch(positions)).permute(0, 3, 1, 2))
        if self.image.size is None:
            shapes = sorted({f"{height} x {width} x {channels}" for height, width, channels in sizes.tolist()})
            raise ConfigError(f"image.size: needed, since the images differ in size or colour: {', '.join(shapes[:5])}")
        # a file may mix grey and colour images
        singles = [with_channels(self.fitted(self.one(position)[None]), self.image.channels) for position in positions]
        return torch.cat(singles)

    def one(self, position: int) -> Tensor:
        """One image as packed, (C, H, W) uint8."""
        return torch.from_numpy(np.array(self.pack[int(position)])).permute(2, 0, 1)

    def fitted(self, images: Tensor) -> Tensor:
        if self.image.size is None:
            return images
        return fit_square(images, self.image.size, self.image.resize or self.image.size)

    def random_crop(self, position: int, rng: np.random.Generator) -> Tensor:
        """Flip and turn the whole image, then cut a box out of it: a crop before the turn would have more corners."""
        from torchvision.transforms.v2 import functional

        assert self.augment is not None
        assert self.augment.crop_scale is not None
        pixels = turn(self.one(position)[None], self.augment, [rng])[0]
        height, width = (int(side) for side in pixels.shape[-2:])
        size = [self.image.size] * 2 if self.image.size is not None else [height, width]
        box = crop_box(height, width, self.augment.crop_scale, self.augment.crop_ratio, rng)
        return functional.resized_crop(pixels, *box, size, antialias=True)

    def normalised(self, images: Tensor) -> Tensor:
        copy = with_channels(images, self.image.channels).to(torch.float32, copy=True)  # it may share its channels
        return copy.div_(255).sub_(self.mean).div_(self.std)


def eval_batches(
    images_path: Path, index_path: Path, positions: np.ndarray, image_cfg: Image, batch_size: int
) -> Iterator[Tensor]:
    """Yield the images at `positions`, in that order, as (B, C, H, W) float32 batches; no random changes."""
    reader = ImageReader(images_path, index_path, image_cfg)
    for start in range(0, len(positions), batch_size):
        yield reader.batch(np.asarray(positions[start : start + batch_size]))


def changes_images(augment: Augment) -> bool:
    return any((augment.flip, augment.vertical_flip, augment.rotate, augment.crop_scale))


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Repeat grey to 3 channels, average colour to 1; (N, 1 or 3, H, W) uint8 to (N, channels, H, W) uint8."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    return images.float().mean(1, keepdim=True).round().to(torch.uint8)


def fit_square(images: Tensor, size: int, shorter: int) -> Tensor:
    """Resize the shorter side (bilinear, antialiased), then crop the centre; (N, C, H, W) to (N, C, size, size)."""
    height, width = images.shape[-2:]
    if height == width == size == shorter:
        return images
    from torchvision.transforms.v2 import functional  # takes longer to load than torch

    if min(height, width) != shorter:
        images = functional.resize(images, [shorter], antialias=True)
    return images if images.shape[-2:] == (size, size) else functional.center_crop(images, [size, size])


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a box of random area and aspect ratio inside an image: top, left, height, width.

    After 10 draws that do not fit, the largest centred box whose ratio is in range.
    Source: Szegedy et al., CVPR 2015, with the draws of torchvision's RandomResizedCrop.
    """
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def turn(images: Tensor, augment: Augment, draws: list[np.random.Generator]) -> Tensor:
    """Flip and rotate each image by its own draws; always three draws an image, so that settings stay independent."""
    values = torch.from_numpy(np.stack([rng.random(3) for rng in draws]))
    images = torch.where((values[:, 0] < augment.flip).view(-1, 1, 1, 1), images.flip(-1), images)
    images = torch.where((values[:, 1] < augment.vertical_flip).view(-1, 1, 1, 1), images.flip(-2), images)
    return rotate(images, (2 * values[:, 2] - 1) * augment.rotate) if augment.rotate else images


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate each image counter-clockwise about its centre, nearest pixel, black corners; degrees (N,)."""
    height, width = images.shape[-2:]
    angle = torch.deg2rad(degrees.double())
    cos, sin, nil = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # grid coordinates run from -1 to 1 on either axis, so the ratio of the sides enters a rotation in pixels
    rows = [torch.stack([cos, -sin * height / width, nil], 1), torch.stack([sin * width / height, cos, nil], 1)]
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1).float(), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images.float(), grid, mode="nearest", align_corners=False).to(images.dtype)
