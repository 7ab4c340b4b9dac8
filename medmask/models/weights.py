"""Weights in files: the project's own model files, and those of others, read without running any code in them."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medmask import io
from medmask.config.training import Head, Image
from medmask.errors import CheckpointError, ConfigError, listing, lookup
from medmask.models.backbones import HEAD_NAMES, Classifier, build_backbone, width_of
from medmask.models.heads import build_head, head_settings

SEEN = "seen.sha256"
NESTED = ("model", "state_dict", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.", "backbone.")


@dataclass(frozen=True)
class ModelSpec:
    """What one needs to know to build the network of a model file; `n_classes` 0 is a backbone without a head."""

    backbone: str
    head: dict[str, Any]
    n_classes: int
    classes: list[str]
    image: dict[str, Any]
    epoch: int


def save_model(path: Path, network: nn.Module | Mapping[str, Tensor], spec: ModelSpec, seen: np.ndarray) -> None:
    """Write a model file.

    Parameters
    ----------
    network : a Classifier, or its state dict: names `backbone.*` and `head.*`
    seen : ndarray, (n,), int64. Pixel digests of the images it was trained on, its ancestors' included.
    """
    state = network.state_dict() if isinstance(network, nn.Module) else network
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    tensors[SEEN] = torch.from_numpy(np.unique(np.asarray(seen, dtype=np.int64)))
    with io.atomic_path(Path(path)) as part:
        save_file(tensors, part, metadata={"medmask": io.to_json(asdict(spec))})


def read_model(path: Path) -> tuple[dict[str, Tensor], ModelSpec, np.ndarray]:
    """Read a model file: its weights, its spec, and the digests of the images it has seen, (n,) int64."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("medmask")
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
    if text is None or SEEN not in state:
        raise CheckpointError(
            f"{path}: not a model file of medmask; load it with a pretraining of `method: weights`, `source: file`"
        )
    try:
        spec = ModelSpec(**json.loads(text))
        check_spec(spec)
    except (TypeError, ValueError) as error:
        fault = "; ".join(str(error).splitlines())
        raise CheckpointError(f"{path}: its description does not fit this version: {fault}") from error
    return state, spec, state.pop(SEEN).numpy()


def check_spec(spec: ModelSpec) -> None:
    """Raise a TypeError or ValueError when no network can be built from a description."""
    Image.model_validate(spec.image)
    if "channels" not in spec.image:
        raise ValueError("image: need `channels`")
    if len(spec.classes) != spec.n_classes:
        raise ValueError(f"n_classes: {spec.n_classes}, but {len(spec.classes)} classes are named")
    if spec.n_classes and (needed := head_settings(Head.model_validate(spec.head))) != spec.head:
        raise ValueError(f"head: need the keys {', '.join(needed)}, got {', '.join(spec.head)}")


def load_classifier(path: Path, n_classes: int | None = None) -> tuple[Classifier, ModelSpec, np.ndarray]:
    """Build the classifier of a model file, in eval mode; `n_classes`, where given, must be the file's."""
    state, spec, seen = read_model(path)
    if spec.n_classes == 0:
        raise CheckpointError(f"{path}: holds a backbone without a head, which cannot classify: finetune it first")
    if n_classes not in (None, spec.n_classes):
        raise CheckpointError(f"{path}: has {spec.n_classes} classes, the data have {n_classes}")
    backbone = build_backbone(spec.backbone, spec.image["channels"])
    network = Classifier(backbone, build_head(spec.head, width=width_of(backbone), n_classes=spec.n_classes))
    load_strictly(network, state, str(path))
    return network.eval(), spec, seen


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load all weights of a network, all finite; CheckpointError with every name that does not fit or is not."""
    own = network.state_dict()
    problems = [f"missing: {name} {shape(own[name])}" for name in own if name not in state]
    problems += [f"left over: {name} {shape(state[name])}" for name in state if name not in own]
    problems += [
        f"{name}: need {shape(own[name])}, got {shape(state[name])}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    if problems:
        raise CheckpointError(f"{where}: weights of another architecture:\n  {listing(problems)}")
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{where}: NaN or infinite values in {', '.join(broken[:20])}")
    network.load_state_dict(dict(state))


def load_backbone(backbone: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a backbone from somebody's weights: all names must fit, apart from those of a last layer."""
    own = backbone.state_dict()
    counts = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}  # not in old files
    heads = tuple(f"{name}." for name in HEAD_NAMES)
    given = {name: value for name, value in state.items() if name in own or not name.startswith(heads)}
    load_strictly(backbone, {**counts, **given}, where)


def load_source(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read somebody's weights from a `.safetensors`, `.pt` or `.pth` file; no code in the file is run.

    A state dict may stand under `model`, `state_dict` or `model_state_dict`; the prefixes `module.`, `_orig_mod.`
    and `backbone.` are taken off. With a prefix `backbone.` only the names that have it are kept.

    Raises
    ------
    CheckpointError : the file is truncated, holds code, has another digest, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"file: no such weights file: {path}")
    if sha256 is not None and (found := io.file_digest(path)) != sha256:
        raise CheckpointError(f"{path}: sha256 is {found}, the settings say {sha256}")
    content = read_tensors(path)
    for name in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: no weights at the top or under {', '.join(NESTED)}")
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor) and name != SEEN}
    return strip_prefixes(state)


def read_tensors(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: holds code or objects, not only tensors, and is not loaded") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole weights file: {first_line(error)}") from error


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take wrappers' prefixes off while there is one: the first two from all names, `backbone.` as a selection."""
    while True:
        prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in state)), None)
        if prefix is None:
            return state
        state = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def download(source: str, name: str, version: str) -> dict[str, Tensor]:
    """Fetch the published weights of a network from torchvision (by their version) or timm.

    Raises
    ------
    ConfigError : torchvision has no such weights. CheckpointError : they cannot be fetched, as on a node offline.
    """
    where = f"weights of {name} from {source}"
    try:
        if source == "torchvision":
            from torchvision import models

            weights = lookup(models.get_model_weights(name).__members__, version, "version")
            return dict(weights.get_state_dict(progress=False, check_hash=True))
        import timm

        model = timm.create_model(name.removeprefix("timm."), pretrained=True, num_classes=0)
        return dict(model.state_dict())
    except ConfigError:
        raise
    except Exception as error:  # each library, and each of its transports, has exceptions of its own
        refuse_download(where, error)


def refuse_download(where: str, error: Exception) -> NoReturn:
    raise CheckpointError(
        f"{where}: cannot be fetched ({type(error).__name__}: {first_line(error)}); "
        "get the file where there is a network and name it with `source: file`, `file:` and `sha256:`"
    ) from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
