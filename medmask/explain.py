"""`python -m medmask explain RUN --against RUN`: what two trained networks look at in the same images."""

import argparse
import logging
from pathlib import Path

from medmask import io
from medmask.config.finetuning import SaliencyMaps
from medmask.errors import ConfigError

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
    from medmask.saliency import looks
    from medmask.saliency.panels import draw_panels

    trained = looks.read_training(args.run)
    other = args.against / "model.safetensors" if args.against else trained.files.get("init")
    if other is None:
        raise ConfigError(f"--against: {args.run} started from no weights; name the run to compare it with")
    looks.refuse_missing(other)
    rows = looks.choose_rows(trained.rows((args.side,)), args.n, args.seed)
    explained = SaliencyMaps(method=args.method, layer=args.layer)
    with_masks = trained.is_masked and args.side == "train"
    figure = draw_panels(*looks.compare(trained, other, rows, explained, with_masks=with_masks))
    out = args.out or args.run / "explain.png"
    with io.atomic_path(out) as part:
        figure.savefig(part, dpi=150)
    log.info("%d images: %s", len(rows), out)
    return 0
