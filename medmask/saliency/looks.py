"""What trained networks look at in the same images, and the masks that a training hid them with, from its files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import ValidationError
from torch import Tensor

from medmask import io
from medmask.config.finetuning import Explanation, MaskRule, SaliencyMaps
from medmask.config.training import Image
from medmask.data.images import ImageReader
from medmask.data.pack import Pack
from medmask.data.tables import read_facts, read_split
from medmask.errors import ConfigError, DataError
from medmask.models.backbones import Classifier
from medmask.models.weights import load_classifier
from medmask.saliency.layers import find_layer
from medmask.saliency.maps import Explainer, resized
from medmask.saliency.masks import Masks
from medmask.saliency.panels import Look


@dataclass(frozen=True)
class Trained:
    """A finished training: its folder, its settings, and the files that it has read, by role."""

    folder: Path
    settings: dict[str, Any]
    files: dict[str, Path]

    @property
    def model(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def is_masked(self) -> bool:
        return self.settings.get("mask_rule") is not None and "maps" in self.files

    @property
    def before(self) -> Path | None:
        """The network that its masks were made from; without masks the one that it started from, if any."""
        if not self.is_masked:
            return self.files.get("init")
        return self.files["maps"].parents[3] / self.maps_record["inputs"]["model"]

    @property
    def maps_record(self) -> dict[str, Any]:
        """What was written of the settings and inputs of its saliency maps."""
        return io.read_json(self.files["maps"].with_name("config.json"))

    @property
    def explained(self) -> SaliencyMaps:
        """How the maps of its masks were made; XGradCAM of the last activation where it has none."""
        return Explanation.model_validate(self.maps_record["config"] if self.is_masked else {"method": "xgradcam"})

    def load(self, weights: Path) -> tuple[Classifier, Image]:
        """A network, which must know as many classes as the split has, and how it is given its images."""
        network, spec, _ = load_classifier(weights, len(read_facts(self.files["summary"], classes=list)["classes"]))
        return network, Image.model_validate(spec.image)

    def rows(self, sides: tuple[str, ...]) -> pd.DataFrame:
        """The rows of its split on these sides; DataError when there are none."""
        pack = Pack.open(self.files["images"], self.files["index"])
        rows, _ = read_split(self.files["split"], self.files["summary"], ("position",), len(pack))
        rows = rows[rows["side"].isin(sides)]
        if rows.empty:
            raise DataError(f"{self.files['split']}: no images on the side {' or '.join(sides)}")
        return rows

    def reader(self) -> ImageReader:
        """Reads images as the network sees them."""
        return ImageReader(self.files["images"], self.files["index"], self.load(self.model)[1])

    def masks(self, positions: np.ndarray) -> Masks:
        """The masks of these images, as the training has used them."""
        try:
            rule = MaskRule.model_validate(self.settings["mask_rule"])
        except ValidationError as error:
            raise ConfigError(f"mask_rule: not of this version: {error.errors()[0]['msg']}") from error
        return Masks(self.files["maps"], rule, positions, self.settings["seed"])


def read_training(folder: Path, root: Path = Path()) -> Trained:
    """Read what the stage wrote of its settings and inputs.

    Parameters
    ----------
    root : the folder that holds `results`, to which the inputs' paths are relative.

    Raises
    ------
    ConfigError : no folder of a training. DataError : a file that it has read, or its model, is gone.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"{folder}: need the folder of a training with its config.json, such as results/finetune/KEY")
    record = io.read_json(path)
    if record.get("stage") not in ("pretrain", "finetune") or "split" not in record.get("inputs", {}):
        raise ConfigError(f"{folder}: need a pretraining or finetuning that has read data, got {record.get('stage')}")
    found = Trained(folder, record["config"], {name: root / file for name, file in record["inputs"].items()})
    refuse_missing(found.model, *found.files.values())
    return found


def refuse_missing(*paths: Path) -> None:
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file; start from the folder that holds `results`")


def choose_rows(rows: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """At most `n` rows, drawn, in turn from each class and, where it is known, with and without cue."""
    drawn = rows.iloc[np.random.default_rng([seed, *b"explain"]).permutation(len(rows))]
    kinds = [name for name in ("label", "has_cue") if name in drawn]
    order = drawn.groupby(kinds).cumcount().rename("turn")
    return drawn.assign(turn=order).sort_values(["turn", *kinds], kind="stable").head(n).drop(columns="turn")


def compare(
    run: Trained, before: Path, after: Path, rows: pd.DataFrame, cfg: SaliencyMaps, *, with_masks: bool
) -> Look:
    """What the networks `before` and `after` look at in the images of these rows, and the masks of the run."""
    positions = rows["position"].to_numpy()
    pixels = run.reader().unmasked(positions)
    maps, probs = zip(*(explain(run, path, rows, cfg) for path in (before, after)), strict=True)
    masks = run.masks(positions)(positions, pixels.shape[2], pixels.shape[3]) if with_masks else None
    cues = rows.get("has_cue", [0] * len(rows))
    texts = [
        (f"{name}{', cue' if cue else ''}", f"p({name}) {first:.2f}", f"p({name}) {second:.2f}")
        for name, cue, first, second in zip(rows["class_name"], cues, *probs, strict=True)
    ]
    return Look(pixels, maps[0], maps[1], masks, texts)


def explain(run: Trained, weights: Path, rows: pd.DataFrame, cfg: SaliencyMaps) -> tuple[Tensor, list[float]]:
    """Maps at the size of the image, (N, H, W), and the probabilities of the true classes."""
    network, image = run.load(weights)
    reader = ImageReader(run.files["images"], run.files["index"], image)
    images, labels = reader.batch(rows["position"].to_numpy()), torch.tensor(rows["label"].to_numpy())
    _, layer = find_layer(network, cfg.layer, images[:1])
    targets = labels if cfg.target == "true" else None
    maps, logits = Explainer(network, layer, cfg.method, cfg.epsilon)(images, targets)
    probs = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    return resized(maps, images.shape[2], images.shape[3]), probs.tolist()


def masked_images(run: Trained, rows: pd.DataFrame, batch: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Batch by batch: which rows, their masks (N, 1, H, W) in [0, 1], 1 keeps, and their pixels, (N, C, H, W) uint8."""
    positions, reader = rows["position"].to_numpy(), run.reader()
    masks = run.masks(positions)
    for start in range(0, len(positions), batch):
        part = slice(start, min(start + batch, len(positions)))
        pixels = reader.unmasked(positions[part])
        yield part, masks(positions[part], pixels.shape[2], pixels.shape[3]), pixels
