"""Stage mask: saliency maps of the training images, as a trained network sees them, at the size of its layer.

Rule and strength belong to the finetuning, so one file serves them all. The maps are computed in shards, which a run
that was stopped in the middle does not compute again.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medmask import io
from medmask.config.finetuning import Explanation
from medmask.config.training import Image
from medmask.data.pack import Pack
from medmask.data.tables import read_split, short_digests
from medmask.errors import ConfigError, DataError
from medmask.stages.evaluate import check_classes

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = Explanation
INPUTS: tuple[str, ...] = ("images", "index", "split", "summary", "model")
OPTIONAL: tuple[str, ...] = ("earlier",)
OUTPUTS: tuple[str, ...] = ("maps", "record")
TRAINS = True  # it has a work folder, as trainings have

SIDES = ("train", "meta_set")
PIXELS_A_BATCH = 200_000  # 256 images of 28 x 28, 16 of 224 x 224: larger batches leave the cache
BATCHES_A_SHARD = 32
log = logging.getLogger(__name__)


def run(
    cfg: Explanation, *, images: Path, index: Path, split: Path, summary: Path, model: Path, maps: Path, record: Path,
    work_dir: Path, checkpoint_min: float, stop: object, check: Callable[[], None], earlier: Path | None = None,
) -> None:  # fmt: skip
    import torch
    from safetensors.torch import save_file

    from medmask.data.images import ImageReader
    from medmask.evaluation.predict import pick_device
    from medmask.models.weights import load_classifier
    from medmask.saliency.layers import find_layer
    from medmask.saliency.maps import Explainer
    from medmask.saliency.masks import Masks
    from medmask.train.checkpoint import fingerprint

    rows, classes = read_split(split, summary, ("position", "sha256"), len(Pack.open(images, index)))
    rows = rows[rows["side"].isin(SIDES)]
    if rows.empty:
        raise DataError(f"{split}: no images on the sides {' and '.join(SIDES)}")
    positions, labels = rows["position"].to_numpy(), torch.tensor(rows["label"].to_numpy())
    network, spec, _ = load_classifier(model)
    check_classes(spec, classes, model, summary)
    device = pick_device(cfg.needs)
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if (cfg.hidden_by is None) != (earlier is None):
        raise ConfigError("--earlier: needed with `hidden_by`, and only there")
    hide = Masks(earlier, cfg.hidden_by, positions, seed=0) if earlier and cfg.hidden_by else None
    reader = ImageReader(images, index, Image.model_validate(spec.image), masks=hide)
    first = reader.batch(positions[:1])
    name, layer = find_layer(network, cfg.layer, first.to(device))
    explain = Explainer(network, layer, cfg.method, cfg.epsilon)
    batch = max(16, min(256, PIXELS_A_BATCH // (first.shape[2] * first.shape[3])))

    def compute(part: slice) -> "Tensor":
        """Maps (n, h, w) float16 of some rows."""
        found = []
        for start in range(part.start, part.stop, batch):
            here = slice(start, min(start + batch, part.stop))
            targets = labels[here].to(device) if cfg.target == "true" else None
            found.append(explain(reader.batch(positions[here]).to(device), targets)[0].half().cpu())
        return torch.cat(found)

    began = time.monotonic()
    inputs: dict[str, Path | None] = {"images": index, "split": split, "model": model}
    own = fingerprint(cfg, inputs | ({"earlier": earlier} if earlier else {}))
    shards = Shards(work_dir / f"maps-{own[:12]}", len(positions), batch * BATCHES_A_SHARD)
    done = shards.fill(compute)
    whole = shards.read()
    seconds = round(time.monotonic() - began, 2)
    tensors = {
        "maps": whole,
        "positions": torch.from_numpy(positions.astype(np.int64)),
        "images": torch.from_numpy(short_digests(rows["sha256"])),
    }
    save_file(tensors | ({"earlier": earlier_rounds(earlier, positions, whole)} if earlier else {}), maps)
    how = {"layer": name, "computed": done, "seconds": seconds, "device": str(device)}
    io.write_json(record, facts_of(whole) | how)
    log.info("%s of %s: %d maps, %d computed in %.1f s", cfg.method, name, len(whole), done, seconds)


def facts_of(maps: "Tensor") -> dict[str, Any]:
    """What is worth knowing of maps (n, h, w)."""
    empty = int((maps.flatten(1).amax(1) == 0).sum())
    notes = [f"{empty} of {len(maps)} saliency maps are all zero"] * (empty > 0)
    return {"images": len(maps), "size": list(maps.shape[1:]), "empty": empty, "notes": notes}


def earlier_rounds(file: Path, positions: np.ndarray, maps: "Tensor") -> "Tensor":
    """Maps (rounds, n, h, w) of the rounds before, which must be of the same images and size as these (n, h, w)."""
    from medmask.saliency.masks import read_maps

    rounds, places, _ = read_maps(file)
    if not np.array_equal(places, positions) or rounds.shape[1:] != maps.shape:
        raise DataError(
            f"{file}: cumulative masks need the same images and the same layer in all rounds; it has maps "
            f"{tuple(rounds.shape[1:])}, this round {tuple(maps.shape)}"
        )
    return rounds


class Shards:
    """Rows of a result in files of `size` rows, each whole or not there; the folder names what they are of."""

    def __init__(self, folder: Path, n: int, size: int) -> None:
        self.folder = folder
        self.parts = [slice(start, min(start + size, n)) for start in range(0, n, size)]

    def path(self, part: slice) -> Path:
        return self.folder / f"{part.start:09d}-{part.stop:09d}.npy"

    def fill(self, compute: Callable[[slice], "Tensor"]) -> int:
        """Compute and write what is missing; the number of rows computed."""
        missing = [part for part in self.parts if not self.path(part).exists()]
        for part in missing:
            with io.atomic_path(self.path(part)) as temporary:
                np.save(temporary, compute(part).numpy())
            log.info("%s: rows %d to %d of %d", self.folder.name, part.start, part.stop, self.parts[-1].stop)
        return sum(part.stop - part.start for part in missing)

    def read(self) -> "Tensor":
        import torch

        return torch.from_numpy(np.concatenate([np.load(self.path(part)) for part in self.parts]))


def tidy(work_dir: Path) -> None:
    """Remove the shards once the outputs stand."""
    for folder in work_dir.glob("maps-*"):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
