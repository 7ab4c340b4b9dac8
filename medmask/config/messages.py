"""Turn pydantic's findings into one line each: where, the rule, what came."""

import re
from typing import Any

from pydantic import ValidationError

from medmask.errors import suggest

WITH_METHODS = ("pretrainings", "finetunings", "pretrain", "finetune")
ALTERNATIVES = ("chain[", "function-", "constrained-", "tuple[", "literal[", "Source")  # parts that name no key


def explain(error: ValidationError, where: str = "") -> str:
    """One line for each key: `key.path: rule, got value`.

    Where a key may be one of several things, pydantic reports on each; the report that goes deepest is kept.
    """
    lines: dict[tuple[str, ...], str] = {}
    for finding in error.errors():
        lines.setdefault(key_path(finding["loc"], where), rule(finding))
    deepest = {
        path: text
        for path, text in lines.items()
        if not any(len(other) > len(path) and other[: len(path)] == path for other in lines)
    }
    return "\n".join(line((where, *path), text) for path, text in deepest.items())


def line(path: tuple[str, ...], text: str) -> str:
    """Key and rule; a rule that begins with a key of its own, `rate: need ...`, goes on the path."""
    key = ".".join(part for part in path if part)
    return f"{key}.{text}" if re.match(r"[a-z_]+(\.[a-z_]+)*: ", text) and key else f"{key}: {text}".removeprefix(": ")


def key_path(loc: tuple, where: str) -> tuple[str, ...]:
    """The keys in a location; the third part of ("finetunings", "plain", "supervised", "lr") is a method and no key."""
    path = [str(part) for part in loc if not str(part).startswith(ALTERNATIVES)]
    first = where.split(".")[0] or (path[0] if path else "")
    method_at = 0 if where else 2
    if first in WITH_METHODS and len(path) > method_at:
        path.pop(method_at)
    return tuple(path)


def rule(finding: Any) -> str:
    """What was broken, and by what."""
    kind, context, value = finding["type"], finding.get("ctx", {}), finding.get("input")
    if kind == "extra_forbidden":
        return f"unknown key (value {value!r})"
    if kind == "missing":
        return "a needed key is missing"
    if kind == "union_tag_invalid":
        return f"method: unknown name {context['tag']!r}; " + suggest(
            context["tag"], context["expected_tags"].replace("'", "").split(", ")
        )
    if kind == "union_tag_not_found":
        return "method: a needed key is missing"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"need a group of keys, got {value!r}"
    if kind == "too_short":
        return f"need at least {context['min_length']}, got {value!r}"
    if kind == "tuple_type":
        return f"need a list, got {value!r}"
    message = finding["msg"].replace("Input should be", "need").replace("a valid string", "text")
    return f"{message[0].lower()}{message[1:]}, got {value!r}"
