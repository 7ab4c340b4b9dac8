"""`python -m medmask explain RUN --against RUN`: what two trained networks look at in the same images.

With `--masks FOLDER`: the masks that a finetuning has hidden its training images with, as files.
"""

import argparse
import logging
from pathlib import Path

from medmask import io
from medmask.errors import ConfigError

log = logging.getLogger(__name__)
SHOWN = 6  # images in the figure, if nothing else is asked for
SIDES = ("train", "val", "test", "meta_set")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a training, such as results/finetune/KEY")
    parser.add_argument(
        "--against", type=Path, help="folder of another one; without it, the one its masks are of, or it started from"
    )
    parser.add_argument("--out", type=Path, help="PNG file (explain.png in the folder of the run)")
    parser.add_argument("-n", type=count, help="images, or all (6; masks: all), in turn by class, with and without cue")
    parser.add_argument("--masks", type=Path, metavar="FOLDER", help="write masks and masked images there instead")
    parser.add_argument("--side", choices=SIDES, default="train", help="side of the split they are from (train)")
    parser.add_argument("--seed", type=int, default=0, help="names the drawing of the images (0)")
    parser.add_argument("--method", choices=("xgradcam", "gradcam"), help="(that of the run's masks, or xgradcam)")
    parser.add_argument("--layer", help="activation that is explained (that of the run's masks, or last_relu)")


def count(text: str) -> int | str:
    """A number of images, or `all`."""
    if text != "all" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"need a whole number above 0, or all, got {text!r}")
    return text if text == "all" else int(text)


def main(args: argparse.Namespace) -> int:
    """Write the figure, or the masks.

    Raises
    ------
    ConfigError, DataError : no such run, a file that it was made of is gone, no images on the side, no masks.
    """
    if args.masks is not None:
        return write_mask_files(args)
    from medmask.saliency import looks
    from medmask.saliency.panels import draw_panels

    trained = looks.read_training(args.run)
    other = args.against / "model.safetensors" if args.against else trained.before
    if other is None:
        raise ConfigError(f"--against: {args.run} started from no weights; name the run to compare it with")
    looks.refuse_missing(other)
    if args.n == "all":
        raise ConfigError("-n: all is for --masks; a figure needs a number of images")
    rows = looks.choose_rows(trained.rows((args.side,)), args.n or SHOWN, args.seed)
    asked = {name: value for name in ("method", "layer") if (value := getattr(args, name)) is not None}
    explained = trained.explained.model_copy(update=asked)
    with_masks = trained.is_masked and args.side == "train"
    figure = draw_panels(*looks.compare(trained, other, trained.model, rows, explained, with_masks=with_masks))
    out = args.out or args.run / "explain.png"
    with io.atomic_path(out) as part:
        figure.savefig(part, dpi=150)
    log.info("%d images: %s", len(rows), out)
    return 0


def write_mask_files(args: argparse.Namespace) -> int:
    """Write the masks of the images that a finetuning was trained on."""
    for name, default in {"against": None, "out": None, "side": "train", "method": None, "layer": None}.items():
        if getattr(args, name) != default:
            raise ConfigError(f"--{name}: not together with --masks, which writes those of the training images")
    from medmask.saliency import looks
    from medmask.saliency.mask_files import write_masks

    trained = looks.read_training(args.run)
    if not trained.is_masked:
        raise ConfigError(f"--masks: {args.run} was trained on whole images: its settings have no mask_rule")
    rows = trained.rows(tuple(trained.settings["train_on"]))
    if args.n not in (None, "all"):
        rows = looks.choose_rows(rows, args.n, args.seed)
    write_masks(trained, rows, args.masks)
    log.info("%d images: %s", len(rows), args.masks)
    return 0
