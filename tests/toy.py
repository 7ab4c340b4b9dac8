"""A small dataset in the form that the data stages write, and short trainings on it."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import nn

from medmask import cli
from medmask.config.finetuning import AnyFinetuning
from medmask.config.training import Augment, Image
from medmask.data.images import ImageReader
from medmask.launch.local import free_port
from medmask.methods import build_method
from medmask.models.backbones import Classifier
from medmask.train.checkpoint import Checkpointer
from medmask.train.distributed import DistContext
from medmask.train.fit import Execution, State, fit
from medmask.train.loader import Rows, TrainingData

OWN_KEYS = {"fold": {"fold": 0, "folds": 3}}  # keys that a method cannot do without
OUTPUTS = {  # of a training, by the name of their flag
    "model": "model.safetensors",
    "best": "best.safetensors",
    "history": "history.jsonl",
    "record": "record.json",
}
SETTINGS: dict[str, Any] = {
    "method": "supervised",
    "backbone": "small_cnn",
    "image": {"size": 28, "channels": 1},
    "epochs": 2,
    "batch_size": 8,
    "lr": 0.05,
    "needs": {"cpus": 1, "gpu": 0},
}


def write_pack(folder: Path, images: list[np.ndarray]) -> None:
    offsets = np.cumsum([0, *(image.size for image in images)])
    np.save(folder / "images.npy", np.concatenate([image.ravel() for image in images]))
    np.save(folder / "index.npy", np.array([(o, *image.shape) for o, image in zip(offsets, images, strict=False)]))


def write_data(
    folder: Path, n: int = 48, n_val: int = 14, side: int = 28, n_classes: int = 2, n_meta: int = 0
) -> dict[str, Path]:
    """Noisy squares with a bright band whose place is the class; every sixth label is flipped, but no trusted one."""
    n, n_first = n + n_meta, n
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    labels = np.arange(n) % n_classes
    images = [rng.integers(0, 120, (side, side, 1)).astype(np.uint8) for _ in range(n)]
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 2] += 100
    write_pack(folder, images)
    noisy = np.where((np.arange(n) % 6 == 0) & (np.arange(n) < n_first), (labels + 1) % n_classes, labels)
    sides = ["train"] * (n_first - n_val) + ["val"] * n_val + ["meta_set"] * n_meta
    split = ["image_id,position,label,class_name,group,sha256,side,test_set"]
    table = ["image_id,true_label,noisy_label,is_flipped"]
    for i in range(n):
        digest = hashlib.sha256(images[i].tobytes()).hexdigest()
        split.append(f"i{i},{i},{labels[i]},c{labels[i]},g{i},{digest},{sides[i]},")
        table.append(f"i{i},{labels[i]},{noisy[i]},{int(labels[i] != noisy[i])}")
    (folder / "split.csv").write_text("\n".join(split) + "\n")
    (folder / "labels.csv").write_text("\n".join(table) + "\n")
    (folder / "split.json").write_text(json.dumps({"classes": [f"c{k}" for k in range(n_classes)]}))
    names = {"images": "images.npy", "index": "index.npy", "split": "split.csv", "summary": "split.json"}
    return {name: folder / file for name, file in {**names, "labels": "labels.csv"}.items()}


def settings(**changes: Any) -> Any:
    own = OWN_KEYS.get(changes.get("method", ""), {})
    return TypeAdapter(AnyFinetuning).validate_python({**SETTINGS, **own, **changes})


def tiny_network(seed: int = 0, n_classes: int = 2, norm: bool = True) -> Classifier:
    """Two convolutions with batch norm, 1 channel, any size."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU(), nn.Conv2d(4, 4, 3)]
    backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return Classifier(backbone, nn.Linear(16, n_classes))


def toy_data(
    folder: Path, n: int = 30, n_val: int = 9, augment: Augment | None = None, seed: int = 0, n_meta: int = 6,
    flip_every: int = 0,
) -> TrainingData:  # fmt: skip
    """8x8 images of two classes; trusted ones beyond `n`; each so many training labels one is flipped, 0 for none."""
    write_data(folder, n, n_val, side=8, n_meta=n_meta)
    true = np.arange(n + n_meta) % 2
    labels = true.copy()
    if flip_every:
        labels[: n - n_val : flip_every] = 1 - labels[: n - n_val : flip_every]
    places = np.split(np.arange(n + n_meta), [n - n_val, n])
    train, val, meta_set = (Rows(rows, labels[rows], true[rows]) for rows in places)
    reader = ImageReader(folder / "images.npy", folder / "index.npy", Image(channels=1), augment, seed)
    weights = np.linspace(0.5, 1.5, n - n_val)
    return TrainingData(train, val, reader, meta_set, n_classes=2, teacher=tiny_network(seed=5), weights=weights)


class StopAfter:
    """A stop flag that is set from its n-th reading on, that is, in step n - 1."""

    def __init__(self, n: int) -> None:
        self.left = n

    @property
    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


def run_fit(
    cfg: Any, data: TrainingData, work: Path, *,
    network: Classifier | None = None, ctx: DistContext | None = None, stop: Any = None, with_memory: bool = False,
) -> tuple[dict[str, torch.Tensor], State]:  # fmt: skip
    """Train a tiny network; weights after the last epoch, and the memory of the images if wanted, and the state."""
    method = build_method(cfg.method, network or tiny_network(), cfg)
    extra = {} if stop is None else {"stop": stop}
    state = fit(cfg, method, data, Execution(ctx or DistContext(), Checkpointer(work, "k"), work, **extra))
    memory = {f"memory.{name}": value for name, value in method.memory().items()} if with_memory else {}
    return {name: value.clone() for name, value in {**method.export(), **memory}.items()}, state


def run_ranks(module: str, folder: Path, n: int = 2) -> list[dict[str, Any]]:
    """Start `python -m module folder` as `n` gloo processes; what each of them left in `rank<r>.pt`."""
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True,
        )
        for rank in range(n)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * n, errors
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(n)]


def wait_for(is_true: Callable[[], object], seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def is_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal to the last bit; NaN where the other is NaN."""
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=0, equal_nan=True) for k in a)


def call_stage(folder: Path, stage: str, key: str, config: Any, files: dict[str, Path], **outputs: str) -> Path:
    """Run a stage as the workflow does; its folder, `results/<stage>/<key>`, as it was given."""
    done = folder / stage / key
    named = {**files, **{name: done / file for name, file in outputs.items()}}
    flags = [text for name, path in named.items() for text in (f"--{name}", str(path))]
    work = ["--work-dir", str(folder.parent / "work" / key)]
    assert cli.main([stage, "--config", json.dumps(config), *work, *flags]) == 0
    return done


def train_masked(results: Path, data: dict[str, Path], rules: dict[str, dict[str, Any]]) -> None:
    """A pretraining `erm`, its saliency maps, and for each rule a finetuning of one epoch on masked images."""
    trained = {"model": "model.safetensors", "best": "best.safetensors", "history": "history.jsonl"}
    trained["record"] = "record.json"
    model = call_stage(results, "pretrain", "erm", SETTINGS, data, **trained) / "model.safetensors"
    seen = {name: path for name, path in data.items() if name != "labels"} | {"model": model}
    found = call_stage(results, "mask", "maps", {"method": "xgradcam"}, seen, maps="maps.safetensors", record="r.json")
    for key, rule in rules.items():
        cfg = {**SETTINGS, "masks": "x", "mask_rule": rule, "epochs": 1}
        start = {"init": model, "maps": found / "maps.safetensors"}
        call_stage(results, "finetune", key, cfg, {**data, **start}, **trained)
