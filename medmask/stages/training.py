"""What the stages pretrain and finetune share: from files to a method, through `fit`, to files."""

import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medmask import io
from medmask.config.training import Image, Training, Weights
from medmask.data.images import ImageReader
from medmask.data.tables import read_facts
from medmask.errors import ConfigError
from medmask.methods import build_method
from medmask.methods.base import Method
from medmask.models.backbones import Classifier, build_backbone, width_of
from medmask.models.cores import use_cores
from medmask.models.freeze import freeze_stages
from medmask.models.heads import build_head, head_settings
from medmask.models.weights import (
    ModelSpec,
    load_backbone,
    load_classifier,
    load_published,
    load_strictly,
    read_model,
    read_momenta,
    save_model,
)
from medmask.saliency.masks import Masks
from medmask.stages.learnt import flip_notes, write_soft_labels, write_weights
from medmask.stages.sides import apply_audit, read_sides
from medmask.train.checkpoint import Checkpointer, fingerprint
from medmask.train.distributed import DistContext, distributed
from medmask.train.fit import Execution, State, fit
from medmask.train.loader import Rows, TrainingData
from medmask.train.optim import momenta_of
from medmask.train.per_image import FOLDER
from medmask.train.signals import StopFlag

FRAMING = ("size", "resize")  # settings of `image` that say what part of it is seen
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Files:
    """Inputs and outputs of a training stage."""

    images: Path
    index: Path
    split: Path
    summary: Path
    labels: Path
    init: Path | None
    teacher: Path | None
    model: Path
    best: Path
    history: Path
    record: Path
    weights: Path | None = None
    soft_labels: Path | None = None
    maps: Path | None = None
    audit: Path | None = None


@dataclass(frozen=True)
class Start:
    """The network that a training starts from, and what is known of it."""

    network: Classifier
    spec: ModelSpec
    seen: np.ndarray
    notes: list[str]
    before: ModelSpec | None  # of the starting weights

    @property
    def has_new_head(self) -> bool:
        return self.before is None or (self.before.head, self.before.classes) != (self.spec.head, self.spec.classes)


def train(
    cfg: Any, work_dir: Path, checkpoint_min: float, files: Files, stop: StopFlag, check: Callable[[], None]
) -> None:
    """Train on all ranks; the main one writes the outputs, and checkpoints while `check` does not raise."""
    use_cores(cfg.needs.cpus)
    classes = read_facts(files.summary, classes=list)["classes"]
    sides, digests = read_sides(cfg, files)
    sides["train"], weights, found = apply_audit(cfg, files.audit, sides, classes)
    start = start_network(cfg, files.init, classes)
    with distributed(cfg.needs.gpu > 0) as ctx:
        check_ranks(cfg, ctx.world)
        masks = read_masks(cfg, files, start, sides["train"], digests)
        reader = ImageReader(files.images, files.index, Image(**start.spec.image), cfg.augment, cfg.seed, masks)
        teacher = read_teacher(files.teacher, start.spec)
        data = TrainingData(sides["train"], sides["val"], reader, sides["meta_set"], len(classes), teacher, weights)
        inputs = {name: getattr(files, name) for name in ("split", "labels", "init")}
        inputs |= {role: path for role in ("teacher", "maps", "audit") if (path := getattr(files, role))}
        checkpointer = Checkpointer(work_dir, fingerprint(cfg, inputs), check)
        method = build_method(cfg.method, start.network, cfg)
        goes_on = getattr(cfg, "optimizer_state", "fresh") == "continued"
        momenta = read_momenta(files.init) if files.init and goes_on else {}
        if start.has_new_head:
            momenta = {name: value for name, value in momenta.items() if not name.startswith("head.")}
        state = fit(cfg, method, data, Execution(ctx, checkpointer, work_dir, checkpoint_min, stop), momenta)
        if ctx.is_main:
            write_models(cfg, files, start, state, method, np.union1d(digests, start.seen))
            shutil.copyfile(work_dir / "history.jsonl", files.history)
            if files.weights is not None:
                write_weights(files.weights, files.split, data.train, work_dir, cfg)
            if files.soft_labels is not None:
                table = method.memory().get("targets")
                write_soft_labels(files.soft_labels, files.split, data.train, table, classes)
            found += method.notes() + flip_notes(method, data.train) + (masks.notes() if masks else [])
            start.notes.extend(found)
            io.write_json(files.record, make_record(cfg, start, state, sides, ctx))
            check()
        ctx.barrier()


def read_masks(cfg: Any, files: Files, start: Start, train: Rows, digests: np.ndarray) -> Masks | None:
    """The masks of the training images, where the settings have a rule for them."""
    rule = getattr(cfg, "mask_rule", None)
    if (rule is None) != (files.maps is None):
        raise ConfigError("--maps: needed with `mask_rule`, and only there")
    if rule is None or files.maps is None:
        return None
    if start.before is not None:
        own, explained = ({name: spec.image[name] for name in FRAMING} for spec in (start.spec, start.before))
        if own != explained:
            raise ConfigError(
                f"image: masks are of the images as the starting network is given them, {explained}, not {own}; "
                "leave `image` out to take its settings"
            )
    return Masks(files.maps, rule, train.positions, cfg.seed, digests)


def tidy(work_dir: Path) -> None:
    """Remove the checkpoints, and the tables that `weights.csv` holds, once the outputs stand."""
    Checkpointer(work_dir, "").clear()
    shutil.rmtree(work_dir / FOLDER, ignore_errors=True)


def read_teacher(path: Path | None, spec: ModelSpec) -> Classifier | None:
    """The network that teaches, frozen; it must know the same classes and be given the same images."""
    if path is None:
        return None
    network, own, _ = load_classifier(path)
    for name in ("classes", "image"):
        if getattr(own, name) != getattr(spec, name):
            raise ConfigError(
                f"teacher: {path} has other {name} than this training: {getattr(own, name)}, not {getattr(spec, name)}"
            )
    return network.requires_grad_(False)


def start_network(cfg: Any, init: Path | None, classes: list[str]) -> Start:
    """Build the classifier: backbone and, where it fits, head from `init`; the rest drawn from the seed."""
    state: dict[str, Tensor] = {}
    notes: list[str] = []
    before, seen = None, np.empty(0, dtype=np.int64)
    if init is not None:
        state, before, seen = read_model(init)
        if cfg.backbone not in (None, before.backbone):
            raise ConfigError(f"backbone: {cfg.backbone} cannot start from the {before.backbone} of {init}")
    elif cfg.backbone is None:
        raise ConfigError("backbone: needed, since there are no starting weights to take it from")
    name = before.backbone if before else cfg.backbone
    image = cfg.image or Image(**(before.image if before else {}))
    head = head_settings(cfg.head)
    spec = ModelSpec(name, head, len(classes), classes, image.model_dump(mode="json"), epoch=0)
    seed_weights(cfg.seed)
    backbone = build_backbone(name, image.channels)
    network = Classifier(backbone, build_head(head, width=width_of(backbone), n_classes=len(classes)))
    start = Start(network, spec, seen, notes, before)
    if before is not None:
        load_strictly(backbone, part_of(state, "backbone."), f"{init}, backbone")
        if not start.has_new_head:
            load_strictly(network.head, part_of(state, "head."), f"{init}, head")
        else:
            notes.append("a new head, since classes or head differ from those of the starting weights")
            log.info("%s: %s", init, notes[-1])
    freeze_stages(backbone, getattr(cfg, "freeze", "none"))
    return start


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def seed_weights(seed: int) -> None:
    """Seed the draw of new weights, by another stream than that of the training steps.

    The backbone is drawn even where it is then loaded, so a new head is the same in all arms of an experiment.
    """
    torch.manual_seed(int(np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1)[0]))


def check_ranks(cfg: Training, world: int) -> None:
    if not cfg.sync_bn and world != cfg.ranks:
        raise ConfigError(
            f"ranks: the settings say {cfg.ranks} and {world} processes run; without `sync_bn` that changes the result"
        )
    if cfg.batch_size < world:
        raise ConfigError(f"batch_size: {cfg.batch_size} images cannot be shared by {world} ranks")


def write_models(cfg: Training, files: Files, start: Start, state: State, method: Method, seen: np.ndarray) -> None:
    """The two model files; the best one is the last one where nothing could be validated, and has no momenta."""
    momenta = momenta_of(method.network, method.optimizers) if cfg.keep_optimizer else {}
    for path, weights, epoch, kept in (
        (files.model, method.export(), cfg.epochs - 1, momenta),
        (files.best, state.best_weights, state.best_epoch, {}),
    ):
        spec = ModelSpec(**{**asdict(start.spec), "epoch": epoch + 1})
        save_model(path, weights, spec, seen, kept)


def make_record(cfg: Training, start: Start, state: State, sides: dict[str, Rows], ctx: DistContext) -> dict[str, Any]:
    """What one wants to know of a finished training; epochs are counted from 1, as in the model files."""
    parameters = list(start.network.parameters())
    notes = list(start.notes)
    if not len(sides["val"]):
        notes.append("no validation images: the best epoch is the last one")
    return {
        "epochs": cfg.epochs,
        "steps": state.step,
        "images_seen": state.images_seen,
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "seconds": round(state.seconds, 2),
        "ranks": ctx.world,
        "device": torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else "cpu",
        "best_epoch": state.best_epoch + 1,
        "last": finite_only(state.last),
        "best": finite_only(state.best),
        "notes": notes,
        "first_commit": state.first_commit,
        "last_commit": io.commit(),
    }


def finite_only(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def load_weights(cfg: Weights, *, model: Path, best: Path, history: Path, record: Path) -> None:
    """A pretraining that is loaded: write somebody's backbone as a model file without a head."""
    if os.environ.get("RANK", "0") != "0":
        return
    backbone = build_backbone(cfg.backbone, cfg.image.channels)
    where = cfg.file or f"{cfg.backbone} of {cfg.source}"
    state, sha256 = load_published(cfg)
    load_backbone(backbone, state, where)
    spec = ModelSpec(cfg.backbone, {}, 0, [], cfg.image.model_dump(mode="json"), epoch=0)
    weights = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    for path in (model, best):
        save_model(path, weights, spec, np.empty(0, dtype=np.int64))
    history.write_text("", encoding="utf-8")
    parameters = sum(p.numel() for p in backbone.parameters())
    notes = [f"weights loaded from {where}"]
    io.write_json(record, {**empty_record(), "parameters": parameters, "sha256": sha256, "notes": notes})


def empty_record() -> dict[str, Any]:
    counts = dict.fromkeys(("epochs", "steps", "images_seen", "trainable", "best_epoch"), 0)
    commits = {"first_commit": io.commit(), "last_commit": io.commit()}
    return {**counts, "seconds": 0.0, "ranks": 1, "device": "cpu", "last": {}, "best": {}, **commits}
