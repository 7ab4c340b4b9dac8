"""Stage finetune: train a classifier, from pretrained weights or from scratch."""

from collections.abc import Callable
from pathlib import Path

from medmask.config.finetuning import AnyFinetuning
from medmask.train.signals import StopFlag

CONFIG = AnyFinetuning
INPUTS: tuple[str, ...] = ("images", "index", "split", "summary", "labels")
OPTIONAL: tuple[str, ...] = ("init", "teacher", "maps", "audit")
OUTPUTS: tuple[str, ...] = ("model", "best", "history", "record")
OPTIONAL_OUTPUTS: tuple[str, ...] = ("weights", "soft_labels")
TRAINS = True


def run(
    cfg: AnyFinetuning, *, work_dir: Path, checkpoint_min: float, stop: StopFlag, check: Callable[[], None],
    **files: Path | None,
) -> None:  # fmt: skip
    from medmask.stages import training  # torch, which `--help` and the launcher do without

    training.train(cfg, work_dir, checkpoint_min, training.Files(**files), stop, check)  # type: ignore[arg-type]


def tidy(work_dir: Path) -> None:
    """What is left to do once the outputs are in place."""
    from medmask.stages import training

    training.tidy(work_dir)
