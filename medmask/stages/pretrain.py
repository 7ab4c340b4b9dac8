"""Stage pretrain: train, or load, a first set of weights."""

from collections.abc import Callable
from pathlib import Path

from medmask.config.training import Pretraining, Weights
from medmask.errors import ConfigError
from medmask.train.signals import StopFlag

CONFIG = Pretraining
INPUTS: tuple[str, ...] = ()
OPTIONAL: tuple[str, ...] = ("images", "index", "split", "summary", "labels", "init")  # loaded weights need no data
OUTPUTS: tuple[str, ...] = ("model", "best", "history", "record")
TRAINS = True


def run(
    cfg: Pretraining, *, work_dir: Path, checkpoint_min: float, stop: StopFlag, check: Callable[[], None],
    **files: Path | None,
) -> None:  # fmt: skip
    from medmask.stages import training  # torch, which `--help` and the launcher do without

    if isinstance(cfg, Weights):
        training.load_weights(cfg, **{name: Path(str(files[name])) for name in OUTPUTS})
        return
    missing = [name for name in OPTIONAL if name != "init" and files[name] is None]
    if missing:
        raise ConfigError(f"--{', --'.join(missing)}: needed to train with `method: {cfg.method}`")
    inputs = training.Files(**files, teacher=None)  # type: ignore[arg-type]
    training.train(cfg, work_dir, checkpoint_min, inputs, stop, check)


def tidy(work_dir: Path) -> None:
    """What is left to do once the outputs are in place."""
    from medmask.stages import training

    training.tidy(work_dir)
