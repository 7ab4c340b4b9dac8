"""Is reading the pack faster than opening image files?"""

import numpy as np
from PIL import Image as Picture

from medmask.data.pack import Pack

N = 256


def test_reading_images(compare, tmp_path):
    """256 images of 200 x 150 from the pack, above reading them as JPEG files with PIL."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (N, 15, 20, 3), dtype=np.uint8)
    pictures = [np.asarray(Picture.fromarray(each).resize((200, 150))) for each in small]
    for number, picture in enumerate(pictures):
        Picture.fromarray(picture).save(tmp_path / f"{number}.jpg", quality=90)
    images, index = tmp_path / "images.npy", tmp_path / "index.npy"
    np.save(images, np.stack(pictures).ravel())
    size = 150 * 200 * 3
    np.save(index, np.stack([np.arange(N) * size, *(np.full(N, side) for side in (150, 200, 3))], axis=1))

    def ours():
        return Pack.open(images, index).batch(np.arange(N)).sum()

    def floor():
        return sum(int(np.asarray(Picture.open(tmp_path / f"{number}.jpg")).sum()) for number in range(N))

    ratio = compare("256 images of 200 x 150 from the pack, above JPEG files with PIL", ours, floor, "for 256 images")
    assert ratio < 0.5
