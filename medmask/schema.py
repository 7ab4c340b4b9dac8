"""`python -m medmask schema`: JSON schema of the config, and the key tables of config/README.md, from the models."""

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from medmask import io
from medmask.config.base import Block, Needs
from medmask.config.data import Dataset, MetaSet, Noise, Shortcut, Split
from medmask.config.experiments import Claim, Config, Evaluation, Experiment, Published, Row, Table
from medmask.config.finetuning import (
    AnyFinetuning,
    Finetuning,
    MaskRule,
    Meta,
    MetaLearning,
    Refurbish,
    SaliencyMaps,
    Source,
)
from medmask.config.training import (
    Augment,
    DataRef,
    Head,
    Image,
    Pretraining,
    Schedule,
    Training,
    Warmup,
)

MARK = "<!-- written by `make schema` from medmask/config; edit there -->"
SECTIONS: dict[str, list[tuple[str, type[Block]]]] = {
    "datasets": [("", Dataset), ("shortcut", Shortcut)],
    "splits": [("", Split), ("meta_set", MetaSet)],
    "noises": [("", Noise)],
    "pretrainings and finetunings": [
        ("keys of every training", Training), ("head", Head), ("image", Image), ("augment", Augment),
        ("schedule", Schedule), ("warmup", Warmup), ("needs", Needs), ("data", DataRef),
        ("keys of finetunings only", Finetuning), ("mask_rule", MaskRule),
        ("keys of methods with a meta set", MetaLearning), ("meta", Meta),
    ],
    "masks": [("", SaliencyMaps)],
    "evaluations": [("", Evaluation)],
    "experiments": [
        ("", Experiment), ("a row in `runs`", Row),
        ("a source: `pretrain` of a row, `teacher` of a finetuning", Source),
        ("published", Published), ("claim", Claim), ("table", Table),
    ],
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--schema", type=Path, default=Path("workflow/schemas/config.schema.json"))
    parser.add_argument("--readme", type=Path, default=Path("config/README.md"))


def main(args: argparse.Namespace) -> int:
    """Write both files."""
    with io.atomic_path(args.schema) as part:
        part.write_text(schema_text(), encoding="utf-8")
    head = args.readme.read_text(encoding="utf-8").split(MARK)[0]
    with io.atomic_path(args.readme) as part:
        part.write_text(head + key_tables(), encoding="utf-8")
    return 0


def schema_text() -> str:
    """JSON schema of a config file, for editors and for the workflow catalogue."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(schema, indent=1) + "\n"


def key_tables() -> str:
    """Markdown tables of all keys: name, allowed values, default, meaning."""
    lines = [MARK, ""]
    for section, groups in SECTIONS.items():
        lines += [f"## {section}", ""]
        for name, model in groups:
            lines += table(
                name, model, parents=Training if issubclass(model, Finetuning) else Row if model is Experiment else None
            )
        if section.startswith("pretrainings"):
            for method in method_models():
                lines += table(
                    f"`method: {method_name(method)}`",
                    method,
                    parents=Finetuning if issubclass(method, Finetuning) else Training,
                )
    return "\n".join(lines).rstrip() + "\n"


def method_models() -> list[type[Block]]:
    models = [*get_args(get_args(Pretraining)[0]), *get_args(get_args(AnyFinetuning)[0])]
    return sorted(models, key=lambda model: issubclass(model, Finetuning))


def method_name(model: type[Block]) -> str:
    stage = "finetunings" if issubclass(model, Finetuning) else "pretrainings"
    return f"{get_args(model.model_fields['method'].annotation)[0]}` in `{stage}"


def table(name: str, model: type[Block], parents: type[BaseModel] | None) -> list[str]:
    """The keys of one model without those of its parent."""
    inherited = set(parents.model_fields) if parents and issubclass(model, parents) else set()
    keys = [
        key
        for key in model.model_fields
        if (key not in inherited and key != "seed") or (key == "seed" and model is Split)
    ]
    lines = ([f"### {name}", ""] if name else []) + [str(model.__doc__).strip().splitlines()[0], ""]
    if model.PUBLISHED and "mode" in model.model_fields:
        lines += [f"`mode: as_published` sets {preset_text(model.PUBLISHED)}.", ""]
    if issubclass(model, Refurbish):
        lines += [f"With `targets: hard` it sets {preset_text(model.PUBLISHED_HARD)}.", ""]
    if not keys or keys == ["method"]:
        return [*lines, "No further keys.", ""] if keys == ["method"] else lines
    schema = model.model_json_schema()["properties"]
    lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        field = model.model_fields[key]
        text = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{key}` | {values(schema[key])} | {default(field)} | {text} |")
    return [*lines, ""]


def preset_text(preset: dict[str, Any]) -> str:
    return ", ".join(f"`{key}: {io.to_json(value)}`" for key, value in preset.items())


def default(field: Any) -> str:
    if field.is_required():
        return "needed"
    value = field.default if field.default is not PydanticUndefined else field.default_factory()
    if isinstance(value, Block):
        return "see below"
    return f"`{json.dumps(value)}`" if value not in ((), {}) else "none"


def values(schema: dict[str, Any]) -> str:
    """Allowed values of a key in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(values(choice) for choice in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`"}.get(
        schema.get("type", ""),
        {"array": "list", "object": "named values", "null": "null"}.get(schema.get("type", ""), "block"),
    )
    low = (
        f" >= {schema['minimum']}"
        if "minimum" in schema
        else f" > {schema['exclusiveMinimum']}"
        if "exclusiveMinimum" in schema
        else ""
    )
    high = (
        f" <= {schema['maximum']}"
        if "maximum" in schema
        else f" < {schema['exclusiveMaximum']}"
        if "exclusiveMaximum" in schema
        else ""
    )
    joint = "," if low and high else ""
    return kind + low + joint + high
