"""Weights in files: the project's own model files, and those of others, read without running any code in them."""

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, hub, nn

from medmask import io
from medmask.config.training import Head, Image, Weights
from medmask.errors import CheckpointError, ConfigError, listing, lookup
from medmask.models.backbones import HEAD_NAMES, Classifier, build_backbone, width_of
from medmask.models.heads import build_head, head_settings

SEEN = "seen.sha256"
MOMENTA = "optimizer."
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


def save_model(
    path: Path, network: nn.Module | Mapping[str, Tensor], spec: ModelSpec, seen: np.ndarray,
    momenta: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write a model file.

    Parameters
    ----------
    network : a Classifier, or its state dict: names `backbone.*` and `head.*`
    seen : ndarray, (n,), int64. Pixel digests of the images it was trained on, its ancestors' included.
    momenta : state of the optimizer, `<parameter>.<entry>`, for a training that goes on with it.
    """
    state = dict(network.state_dict() if isinstance(network, nn.Module) else network)
    state |= {MOMENTA + name: value for name, value in (momenta or {}).items()}
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
    seen = state.pop(SEEN).numpy()
    return {name: value for name, value in state.items() if not name.startswith(MOMENTA)}, spec, seen


def read_momenta(path: Path) -> dict[str, Tensor]:
    """The state of the optimizer that a model file holds: `<parameter>.<entry>` to its tensor.

    Raises
    ------
    ConfigError : it holds none.
    """
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(MOMENTA)]  # noqa: SIM118  # this is no dict
        found = {name.removeprefix(MOMENTA): file.get_tensor(name) for name in names}
    if not found:
        raise ConfigError(f"optimizer_state: {path} holds no momenta; train it with `keep_optimizer: true`")
    return found


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


def load_published(cfg: Weights) -> tuple[dict[str, Tensor], str]:
    """Somebody's weights, and their sha256: that of the file; of timm, whose files are in many places, of the tensors.

    Raises
    ------
    ConfigError : no such file, network or version. CheckpointError : they cannot be fetched, or are not those named.
    """
    if cfg.source == "timm":
        state = download_timm(cfg.backbone)
        return state, check_digest(cfg, hashlib.sha256(save(state)).hexdigest())
    path = Path(str(cfg.file)) if cfg.source == "file" else download_torchvision(cfg.backbone, cfg.version)
    if not path.is_file():
        raise ConfigError(f"file: no such weights file: {path}")
    digest = check_digest(cfg, io.file_digest(path))
    return load_source(path), digest


def check_digest(cfg: Weights, found: str) -> str:
    if cfg.sha256 not in (None, found):
        where = cfg.file or f"{cfg.backbone} of {cfg.source}"
        raise CheckpointError(f"{where}: sha256 is {found}, the settings say {cfg.sha256}")
    return found


def load_source(path: Path) -> dict[str, Tensor]:
    """Read somebody's weights from a `.safetensors`, `.pt` or `.pth` file; no code in the file is run.

    A state dict may stand under `model`, `state_dict` or `model_state_dict`; the prefixes `module.`, `_orig_mod.`
    and `backbone.` are taken off. With a prefix `backbone.` only the names that have it are kept.

    Raises
    ------
    CheckpointError : the file is truncated, holds code, or holds no tensors.
    """
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


def download_torchvision(name: str, version: str) -> Path:
    """The file of torchvision's weights, fetched unless it is there, in `$TORCH_HOME/hub/checkpoints`."""
    from torchvision import models

    lookup(dict.fromkeys(models.list_models()), name, "backbone")
    url = lookup(models.get_model_weights(name).__members__, version, "version").url
    path = Path(hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    digest = hub.HASH_REGEX.search(path.name)  # its first digits stand in the name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            hub.download_url_to_file(url, str(path), digest and digest[1], progress=False)
        except Exception as error:  # each transport has exceptions of its own
            refuse_download(f"weights of {name} from torchvision", error)
    if digest and not io.file_digest(path).startswith(digest[1]):
        raise CheckpointError(f"{path}: damaged, its sha256 does not begin with {digest[1]}; delete it")
    return path


def download_timm(name: str) -> dict[str, Tensor]:
    """timm's weights, without the last layer, fetched unless they are in the cache of the Hugging Face hub."""
    import timm

    try:
        return dict(timm.create_model(name.removeprefix("timm."), pretrained=True, num_classes=0).state_dict())
    except Exception as error:  # as above
        refuse_download(f"weights of {name} from timm", error)


def refuse_download(where: str, error: Exception) -> NoReturn:
    raise CheckpointError(
        f"{where}: cannot be fetched ({type(error).__name__}: {first_line(error)}); "
        "get the file where there is a network and name it with `source: file`, `file:` and `sha256:`"
    ) from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
