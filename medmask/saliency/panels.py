"""Figure of what two networks look at: a row an image, with the mask between them where there is one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

COLOURS = "turbo"  # the order of the published figures' jet, with even steps


def draw_panels(
    images: Tensor, before: Tensor, after: Tensor, masks: Tensor | None, texts: Sequence[tuple[str, str, str]]
) -> Any:
    """A matplotlib figure: image, map before, mask, masked image, map after.

    Parameters
    ----------
    images : (N, C, H, W) uint8. before, after : maps (N, H, W) in [0, 1].
    masks : (N, 1, H, W) in [0, 1], 1 keeps; None leaves the two panels out.
    texts : three for each image: what stands under the image, the map before and the map after.
    """
    from matplotlib.figure import Figure

    pixels = images.permute(0, 2, 3, 1).numpy().astype(float) / 255
    pixels = pixels if pixels.shape[-1] == 3 else pixels.repeat(3, axis=-1)
    titles = [
        "image",
        "map before",
        *(["mask (black hides)", "masked image"] if masks is not None else []),
        "map after",
    ]
    figure = Figure(figsize=(1.7 * len(titles), 1.9 * len(pixels) + 0.3), layout="constrained")
    grid = figure.subplots(len(pixels), len(titles), squeeze=False)
    for i, (row, image) in enumerate(zip(grid, pixels, strict=True)):
        shown: list[tuple[Any, Any, str]] = [(image, None, texts[i][0]), (image, before[i], texts[i][1])]
        if masks is not None:
            keep = masks[i, 0].numpy()[..., None]
            shown += [(np.broadcast_to(keep, image.shape), None, ""), (image * keep, None, "")]
        shown.append((image, after[i], texts[i][2]))
        for axes, (picture, overlay, text) in zip(row, shown, strict=True):
            axes.imshow(picture, vmin=0, vmax=1, interpolation="nearest")
            if overlay is not None:
                axes.imshow(overlay.numpy(), vmin=0, vmax=1, cmap=COLOURS, alpha=0.5)
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(text, fontsize=7)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    return figure
