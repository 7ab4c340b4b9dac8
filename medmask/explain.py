"""`python -m medmask explain RUN --against RUN`: what two trained networks look at in the same images."""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import TypeAdapter, ValidationError

from medmask import io
from medmask.config.finetuning import MaskRule
from medmask.config.training import Image
from medmask.data.pack import Pack
from medmask.data.tables import read_split
from medmask.errors import ConfigError, DataError

log = logging.getLogger(__name__)
SIDES = ("train", "val", "test", "meta_set")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a training, such as results/finetune/KEY")
    parser.add_argument("--against", type=Path, help="folder of another one; without it, what the run started from")
    parser.add_argument("--out", type=Path, help="PNG file (explain.png in the folder of the run)")
    parser.add_argument("-n", type=int, default=6, help="images (6), in turn from each class, with and without cue")
    parser.add_argument("--side", choices=SIDES, default="train", help="side of the split they are from (train)")
    parser.add_argument("--seed", type=int, default=0, help="names the drawing of the images (0)")
    parser.add_argument("--method", choices=("xgradcam", "gradcam"), default="xgradcam", help="(xgradcam)")
    parser.add_argument("--layer", default="last_relu", help="activation that is explained (last_relu)")


def main(args: argparse.Namespace) -> int:
    """Write the figure.

    Raises
    ------
    ConfigError, DataError : no such run, a file that it was made of is gone, no images on the side.
    """
    from medmask.data.images import ImageReader
    from medmask.models.weights import load_classifier
    from medmask.saliency.masks import Masks
    from medmask.saliency.panels import draw_panels

    record = read_record(args.run)
    files = {name: Path(path) for name, path in record["inputs"].items()}
    other = args.against / "model.safetensors" if args.against else files.get("init")
    if other is None:
        raise ConfigError(f"--against: {args.run} started from no weights; name the run to compare it with")
    for path in (other, args.run / "model.safetensors", *files.values()):
        if not path.exists():
            raise DataError(f"{path}: no such file; start from the folder that holds `results`")
    rows, classes = read_split(
        files["split"], files["summary"], ("position",), len(Pack.open(files["images"], files["index"]))
    )
    rows = choose_rows(rows[rows["side"] == args.side], args.n, args.seed)
    if rows.empty:
        raise DataError(f"{files['split']}: no images on the side {args.side}")
    positions = rows["position"].to_numpy()
    _, spec, _ = load_classifier(args.run / "model.safetensors", len(classes))
    pixels = ImageReader(files["images"], files["index"], Image.model_validate(spec.image)).unmasked(positions)
    found = [look(path, files, rows, args) for path in (other, args.run / "model.safetensors")]
    masks, rule = None, record["config"].get("mask_rule")
    if rule is not None and "maps" in files and args.side == "train":
        own = Masks(files["maps"], read_rule(rule), positions, record["config"]["seed"])
        masks = own(positions, pixels.shape[2], pixels.shape[3])
    cues = rows.get("has_cue", [0] * len(rows))
    texts = [
        (f"{name}{', cue' if cue else ''}", f"p({name}) {before:.2f}", f"p({name}) {after:.2f}")
        for name, cue, before, after in zip(rows["class_name"], cues, found[0][1], found[1][1], strict=True)
    ]
    out = args.out or args.run / "explain.png"
    figure = draw_panels(pixels, found[0][0], found[1][0], masks, texts)
    with io.atomic_path(out) as part:
        figure.savefig(part, dpi=150)
    log.info("%d images: %s", len(rows), out)
    return 0


def read_record(folder: Path) -> dict[str, Any]:
    """What the stage wrote of its settings and inputs."""
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"{folder}: need the folder of a training with its config.json, such as results/finetune/KEY")
    record = io.read_json(path)
    if record.get("stage") not in ("pretrain", "finetune") or "split" not in record.get("inputs", {}):
        raise ConfigError(f"{folder}: need a pretraining or finetuning that has read data, got {record.get('stage')}")
    return record


def read_rule(rule: dict[str, Any]) -> MaskRule:
    try:
        return TypeAdapter(MaskRule).validate_python(rule)
    except ValidationError as error:
        raise ConfigError(f"mask_rule: not of this version: {error.errors()[0]['msg']}") from error


def choose_rows(rows: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """At most `n` rows, drawn, in turn from each class and, where it is known, with and without cue."""
    drawn = rows.iloc[np.random.default_rng([seed, *b"explain"]).permutation(len(rows))]
    kinds = [name for name in ("label", "has_cue") if name in drawn]
    order = drawn.groupby(kinds).cumcount().rename("turn")
    return drawn.assign(turn=order).sort_values(["turn", *kinds], kind="stable").head(n).drop(columns="turn")


def look(weights: Path, files: dict[str, Path], rows: pd.DataFrame, args: argparse.Namespace) -> tuple[Any, Any]:
    """Maps of the true class at the size of the image, (N, H, W), and its probabilities (N,)."""
    import torch

    from medmask.data.images import ImageReader
    from medmask.models.weights import load_classifier
    from medmask.saliency.layers import find_layer
    from medmask.saliency.maps import Explainer, resized

    network, spec, _ = load_classifier(weights)
    reader = ImageReader(files["images"], files["index"], Image.model_validate(spec.image))
    images, labels = reader.batch(rows["position"].to_numpy()), torch.tensor(rows["label"].to_numpy())
    _, layer = find_layer(network, args.layer, images[:1])
    maps, logits = Explainer(network, layer, args.method)(images, labels)
    probs = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    return resized(maps, images.shape[2], images.shape[3]), probs.tolist()
