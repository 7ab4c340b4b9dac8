"""The command line: one command a stage, whose flags are the files it reads and writes.

Exit codes: 0 done, 2 a mistake of the user's (one line: where, the rule, what came), 1 a bug (traceback),
75 a training run that was told to stop and has saved its state.
"""

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from medmask import __version__, io
from medmask.config.messages import explain
from medmask.config.training import Training
from medmask.errors import ConfigError, MedmaskError, Stopped
from medmask.train.lease import writer
from medmask.train.signals import StopFlag, watch_signals

log = logging.getLogger(__name__)
STAGES = {
    "data": "read a dataset into a manifest and one packed file of pixels",
    "split": "put each image on a side: train, val, test, meta_set",
    "noise": "flip labels at random",
    "pretrain": "train, or load, a first set of weights",
    "mask": "compute where a network looks in each training image",
    "audit": "find training labels that are probably wrong, by networks that have not trained on them",
    "finetune": "train a classifier, from pretrained weights or from scratch",
    "evaluate": "predict the test sets and compute the metrics with their intervals",
    "runs": "write down the runs of an experiment",
    "panels": "draw what the worst and the best setting of masks look at",
    "aggregate": "put the runs of an experiment into tables and figures",
}
COMMANDS = {
    "plan": "show which runs are new, which are done, and what each job asks for",
    "explain": "draw what two trained networks look at in the same images",
    "schema": "write the JSON schema of the config and the key tables of config/README.md",
    "doctor": "check a Slurm site, and the profile that describes it, before the first submission",
}
FILES = {  # what a flag stands for
    "manifest": "manifest.csv: one row an image, in pack order",
    "images": "images.npy: all pixels, uint8",
    "index": "index.npy: place and size of each image in it",
    "dataset": "dataset.json: classes, counts, lists",
    "split": "split.csv: side and group of each image",
    "summary": "split.json (of aggregate: summary.csv): counts and notes",
    "labels": "labels.csv: true and noisy label of each image",
    "transition": "transition.json: what the noise did to each class",
    "figure": "transition.png",
    "init": "model.safetensors to start from",
    "teacher": "model.safetensors of a teacher (upper_bound)",
    "maps": "maps.safetensors: saliency maps at the size of the layer, and the positions of their images",
    "networks": "model.safetensors of the training without each fold, in the order of the folds",
    "audit": "audit.csv: each label judged: its fold, its quality, whether it is probably an error",
    "model": "model.safetensors: weights of the last epoch",
    "best": "best.safetensors: weights of the best epoch on validation",
    "history": "history.jsonl: losses and validation numbers by step",
    "record": "record.json: epochs, time, best epoch, notes",
    "weights": "weights.csv: weight and trust of each training image, by epoch (header only where a method has none)",
    "soft_labels": "soft_labels.csv: last target of each training image (header only where a method keeps none)",
    "predictions": "predictions.csv: of the last epoch, one row a test image",
    "predictions_best": "predictions_best.csv: of the best epoch",
    "metrics": "metrics.json: metrics with intervals, by test set",
    "panels": "panels.png",
    "runs": "runs.json: the runs of an experiment, their keys and settings",
}
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again


def main(argv: Sequence[str]) -> int:
    """Run one command; return its exit code."""
    parser = argparse.ArgumentParser("medmask", description="Stages and commands of medmask.")
    parser.add_argument("--version", action="version", version=f"medmask {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = argv[0] if argv else ""
    for name, summary in {**STAGES, **COMMANDS}.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == chosen in STAGES:
            add_stage_arguments(command, stage_module(name))
        elif name == chosen in COMMANDS:
            importlib.import_module(f"medmask.{name}").add_arguments(command)
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if is_main_rank() else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    work_dir = getattr(args, "work_dir", None)
    try:
        if args.command in COMMANDS:
            return run_command(args)
        if work_dir is not None:
            (work_dir / "refused").unlink(missing_ok=True)
        run_stage(args)
    except Stopped as stop:
        if is_main_rank():
            print(f"medmask {args.command}: {stop}", file=sys.stderr)
        return STOPPED
    except MedmaskError as error:
        if is_main_rank():
            print(f"medmask {args.command}: error: {error}", file=sys.stderr)
        if work_dir is not None:
            with io.atomic_path(work_dir / "refused") as part:
                part.write_text(f"{error}\n", encoding="utf-8")
        return 2
    return 0


def run_command(args: argparse.Namespace) -> int:
    """Call `main` of the module that is named like the command."""
    try:
        code: int = importlib.import_module(f"medmask.{args.command}").main(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `doctor | head`: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def is_main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def stage_module(name: str) -> ModuleType:
    """The module of a stage; it has CONFIG, INPUTS, OPTIONAL, OUTPUTS and run, and for training TRAINS."""
    return importlib.import_module(f"medmask.stages.{name}")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_stage_arguments(parser: argparse.ArgumentParser, stage: ModuleType) -> None:
    """The flags of a stage are its input and output files."""
    parser.add_argument("--config", required=True, help="settings: JSON text, or the name of a JSON file")
    for name in stage.INPUTS:
        parser.add_argument(flag(name), type=Path, required=True, help=f"input, {FILES.get(name, name)}")
    for name in getattr(stage, "LISTS", ()):
        parser.add_argument(flag(name), type=Path, required=True, nargs="+", help=f"inputs, {FILES.get(name, name)}")
    for name in stage.OPTIONAL:
        parser.add_argument(flag(name), type=Path, help=f"input, if any, {FILES.get(name, name)}")
    for name in stage.OUTPUTS:
        parser.add_argument(flag(name), type=Path, required=True, help=f"output, {FILES.get(name, name)}")
    for name in getattr(stage, "OPTIONAL_OUTPUTS", ()):
        parser.add_argument(flag(name), type=Path, help=f"output, if wanted, {FILES.get(name, name)}")
    if getattr(stage, "NEEDS_DATA_ROOT", False):
        parser.add_argument("--data-root", type=Path, required=True, help="folder that holds the datasets")
    if getattr(stage, "TRAINS", False):
        parser.add_argument("--work-dir", type=Path, required=True, help="folder of checkpoints and TensorBoard files")
        parser.add_argument("--checkpoint-min", type=float, default=15, help="minutes between checkpoints (15)")


def targets_of(stage: ModuleType, args: argparse.Namespace) -> dict[str, Path]:
    """The output files asked for, by name; the one that tells that all is done comes last."""
    wanted = [name for name in getattr(stage, "OPTIONAL_OUTPUTS", ()) if getattr(args, name) is not None]
    return {name: getattr(args, name) for name in (*wanted, *stage.OUTPUTS)}


def run_stage(args: argparse.Namespace) -> None:
    """Check settings and inputs, run the stage on temporary outputs, and move them into place when all is done."""
    stage = stage_module(args.command)
    settings = parse_settings(args.config, stage.CONFIG, args.command)
    lists = {name: getattr(args, name) for name in getattr(stage, "LISTS", ())}
    inputs = {name: getattr(args, name) for name in (*stage.INPUTS, *stage.OPTIONAL)}
    for name, paths in (lists | {name: [path] for name, path in inputs.items()}).items():
        if missing := [path for path in paths if path is not None and not path.exists()]:
            raise ConfigError(f"{flag(name)}: no such file: {missing[0]}")
    more: dict[str, Any] = {}
    if getattr(stage, "NEEDS_DATA_ROOT", False):
        more["data_root"] = args.data_root
    targets = targets_of(stage, args)
    record = {
        "stage": args.command,
        **io.provenance(),
        "config": TypeAdapter(stage.CONFIG).dump_python(settings, mode="json"),
        "inputs": {name: str(path) for name, path in inputs.items() if path is not None}
        | {name: list(map(str, paths)) for name, paths in lists.items()},
    }
    with ExitStack() as until_published:
        if getattr(stage, "TRAINS", False):
            right = right_to_train(until_published, args.work_dir, settings, list(targets.values()))
            if right is None:
                return
            more |= {"work_dir": args.work_dir, "checkpoint_min": args.checkpoint_min, **right}
        with all_or_none(targets) as parts:
            stage.run(settings, **inputs, **lists, **more, **parts)
            if is_main_rank():
                io.write_json(targets[stage.OUTPUTS[0]].with_name("config.json"), record)
        if getattr(stage, "TRAINS", False) and is_main_rank():
            stage.tidy(args.work_dir)  # not before the outputs stand: a kill in between would cost the whole training


def right_to_train(stack: ExitStack, work_dir: Path, settings: Any, targets: list[Path]) -> dict[str, Any] | None:
    """Watch the signals and become the only writer until `stack` closes; None if another job has finished the run.

    Returns what a training is given: `stop`, its flag, and `check`, which raises once it may not write any more.
    """
    check: Callable[[], None] = lambda: None  # noqa: E731
    if not isinstance(settings, Training):  # weights are only loaded, and Ctrl-C ends that
        return {"stop": StopFlag(), "check": check}
    stop = stack.enter_context(watch_signals())
    if is_main_rank():
        before = last_changes(targets)
        lease = stack.enter_context(writer(work_dir, stop))
        now = last_changes(targets)
        if all(new is not None and new != old for new, old in zip(now, before, strict=True)):
            log.info("%s: another job has finished this run in the meantime", work_dir)
            return None
        check = lease.check
    return {"stop": stop, "check": check}


def last_changes(paths: list[Path]) -> list[int | None]:
    """When each file was last changed, ns; None without one. Folders are listed, so that a file server is asked."""
    there = {file for folder in {path.parent for path in paths} if folder.exists() for file in folder.iterdir()}
    return [path.stat().st_mtime_ns if path in there else None for path in paths]


def parse_settings(text: str, model: Any, where: str) -> Any:
    """Settings from JSON text or from a JSON file, checked; ConfigError when a key breaks a rule."""
    try:
        given = json.loads(text) if text.lstrip().startswith("{") else io.read_json(Path(text))
        if isinstance(given, dict) and set(given) >= {"stage", "config", "medmask"}:
            given = given["config"]  # the config.json of an earlier result
        return TypeAdapter(model).validate_python(given)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--config: not JSON: {error}") from error
    except OSError as error:
        raise ConfigError(f"--config: cannot read {text}: {error.strerror}") from error
    except ValidationError as error:
        raise ConfigError(explain(error, where)) from error


@contextmanager
def all_or_none(targets: dict[str, Path]) -> Iterator[dict[str, Path]]:
    """Yield temporary names for outputs; on success rename all, in order, on failure leave what was there before."""
    parts = {}
    for name, path in targets.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".part-*-{path.name}") if is_main_rank() else ():
            left.unlink(missing_ok=True)  # of a stage that was killed
        parts[name] = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        yield parts
        if is_main_rank():
            for name, path in targets.items():
                io.publish(parts[name], path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
