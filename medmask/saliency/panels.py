"""Figure of what two networks look at: a row an image, with the mask between them where there is one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

COLOURS = "turbo"  # the order of the published figures' jet, with even steps


class Look(NamedTuple):
    """What two networks look at in N images.

    images : (N, C, H, W) uint8. before, after : maps (N, H, W) in [0, 1].
    masks : (N, 1, H, W) in [0, 1], 1 keeps; None leaves the two panels out.
    texts : three for each image: what stands under the image, the map before and the map after.
    """

    images: Tensor
    before: Tensor
    after: Tensor
    masks: Tensor | None
    texts: Sequence[tuple[str, str, str]]

    @property
    def titles(self) -> list[str]:
        between = ["mask (black hides)", "masked image"] if self.masks is not None else []
        return ["image", "map before", *between, "map after"]


def draw_panels(
    images: Tensor, before: Tensor, after: Tensor, masks: Tensor | None, texts: Sequence[tuple[str, str, str]]
) -> Any:
    """A matplotlib figure: image, map before, mask, masked image, map after; the arguments are those of a `Look`."""
    from matplotlib.figure import Figure

    look = Look(images, before, after, masks, texts)
    figure = Figure(figsize=(1.7 * len(look.titles), 1.9 * len(images) + 0.3), layout="constrained")
    draw_look(figure.subplots(len(images), len(look.titles), squeeze=False), look)
    return figure


def draw_look(grid: Any, look: Look) -> None:
    """Fill axes, (N, panels)."""
    pixels = look.images.permute(0, 2, 3, 1).numpy().astype(float) / 255
    pixels = pixels if pixels.shape[-1] == 3 else pixels.repeat(3, axis=-1)
    for i, (row, image) in enumerate(zip(grid, pixels, strict=True)):
        texts = look.texts[i]
        shown: list[tuple[Any, Any, str]] = [(image, None, texts[0]), (image, look.before[i], texts[1])]
        if look.masks is not None:
            keep = look.masks[i, 0].numpy()[..., None]
            shown += [(np.broadcast_to(keep, image.shape), None, ""), (image * keep, None, "")]
        shown.append((image, look.after[i], texts[2]))
        for axes, (picture, overlay, text) in zip(row, shown, strict=True):
            axes.imshow(picture, vmin=0, vmax=1, interpolation="nearest")
            if overlay is not None:
                axes.imshow(overlay.numpy(), vmin=0, vmax=1, cmap=COLOURS, alpha=0.5)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color="#999999", linewidth=0.6)  # a mask may be white all over
            axes.set_xlabel(text, fontsize=7)
    for axes, title in zip(grid[0], look.titles, strict=True):
        axes.set_title(title, fontsize=9)
