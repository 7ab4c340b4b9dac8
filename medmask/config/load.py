"""From the YAML of a config file to checked blocks."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from medmask.config.base import STAGES, Block
from medmask.config.data import Dataset, Noise, Split
from medmask.config.experiments import Config, Evaluation
from medmask.config.finetuning import AnyFinetuning, SaliencyMaps
from medmask.config.messages import explain
from medmask.config.training import Pretraining
from medmask.errors import ConfigError, lookup

# field of a run -> (section of the config file, model of a block, blocks that need not be written down)
SECTIONS: dict[str, tuple[str, Any, dict[str, dict]]] = {
    "dataset": ("datasets", Dataset, {}),
    "split": ("splits", Split, {}),
    "noise": ("noises", Noise, {"none": {"kind": "none"}}),
    "pretrain": ("pretrainings", Pretraining, {}),
    "mask": ("masks", SaliencyMaps, {}),
    "finetune": ("finetunings", AnyFinetuning, {}),
    "evaluate": ("evaluations", Evaluation, {"default": {}}),
}
ADAPTERS = {field: TypeAdapter(model) for field, (_, model, _) in SECTIONS.items()}


@dataclass(frozen=True)
class Blocks:
    """A checked config file, and its blocks with changes applied; each distinct block is checked once."""

    raw: dict[str, Any]
    config: Config

    @cached_property
    def _known(self) -> dict[tuple, Block]:
        return {}

    def block(self, field: str, name: str, changes: tuple[tuple[str, Any], ...] = (), where: str = "") -> Any:
        """The block `name` of a field, with `changes` ((path, value), ...) made to its keys.

        Raises
        ------
        ConfigError : there is no such block, or a changed key breaks a rule.
        """
        memo = (field, name, repr(changes))
        if memo not in self._known:
            section = SECTIONS[field][0]
            given = lookup(self.raw[section], name, f"{where}.{field}".lstrip("."))
            for path, value in changes:
                given = changed(given, path.split("."), value)
            try:
                self._known[memo] = ADAPTERS[field].validate_python(given)
            except ValidationError as error:
                origin = f" (changed by {where}.set)" if changes else ""
                raise ConfigError(explain(error, f"{section}.{name}") + origin) from error
        return self._known[memo]


def changed(block: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """A copy of nested dicts with one value replaced."""
    head, *rest = path
    inner = block.get(head)
    if rest and not isinstance(inner, dict):
        inner = {}
    return {**block, head: changed(inner, rest, value) if rest and inner is not None else value}


def read_yaml(path: Path, need: str) -> dict[str, Any]:
    """A YAML file that holds a mapping; ConfigError when it cannot be read, or when what it holds is not `need`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: need {need}, got {type(content).__name__}")
    return content


def load_config(raw: dict[str, Any]) -> Blocks:
    """Check a config as YAML gave it.

    Raises
    ------
    ConfigError : unknown key, wrong type, out of range, contradictory settings; one line each, with the key.
    """
    raw = {str(key): value for key, value in normalised(raw, "").items()}
    for section, _, implied in SECTIONS.values():
        if not isinstance(raw.setdefault(section, {}), dict):
            raise ConfigError(f"{section}: need named blocks, got {raw[section]!r}")
        raw[section] = {**implied, **raw[section]}
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error
    for section in ("pretrainings", "finetunings"):
        if "none" in raw[section]:
            raise ConfigError(f"{section}.none: `none` means no such stage; choose another name")
    for section in ("noises", "pretrainings", "finetunings"):
        for name, block in raw[section].items():
            if "seed" in block:
                raise ConfigError(f"{section}.{name}.seed: seeds come from `experiments.<name>.seeds`")
    for name in config.experiments:
        if name in STAGES:
            raise ConfigError(f"experiments.{name}: the name of a stage; choose another one")
    return Blocks(raw, config)


def normalised(value: Any, where: str) -> Any:
    """Keys become text; boolean keys, which YAML makes of on, off, yes and no, are refused."""
    if isinstance(value, dict):
        for key in value:
            if isinstance(key, bool) or key is None:
                raise ConfigError(f"{where or 'config'}: the key {key} was on, off, yes, no or empty; put it in quotes")
        return {str(key): normalised(inner, f"{where}.{key}".lstrip(".")) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [normalised(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
    return value
