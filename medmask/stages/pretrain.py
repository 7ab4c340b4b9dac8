"""Stage pretrain: train, or load, a first set of weights."""

from pathlib import Path

from medmask.config.training import Pretraining, Weights
from medmask.errors import ConfigError

CONFIG = Pretraining
INPUTS: tuple[str, ...] = ()
OPTIONAL: tuple[str, ...] = ("images", "index", "split", "summary", "labels", "init")  # loaded weights need no data
OUTPUTS: tuple[str, ...] = ("model", "best", "history", "record")
TRAINS = True


def run(cfg: Pretraining, *, work_dir: Path, checkpoint_min: float, **files: Path | None) -> None:
    from medmask.stages import training  # torch, which `--help` and the launcher do without

    if isinstance(cfg, Weights):
        training.load_weights(cfg, **{name: Path(str(files[name])) for name in OUTPUTS})
        return
    missing = [name for name in OPTIONAL if name != "init" and files[name] is None]
    if missing:
        raise ConfigError(f"--{', --'.join(missing)}: needed to train with `method: {cfg.method}`")
    training.train(cfg, work_dir, checkpoint_min, training.Files(**files, teacher=None))  # type: ignore[arg-type]


def tidy(work_dir: Path) -> None:
    """What is left to do once the outputs are in place."""
    from medmask.stages import training

    training.tidy(work_dir)
