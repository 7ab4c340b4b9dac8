"""Errors that a user can mend; each message says where, the rule, and what came."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class MedmaskError(Exception):
    """A mistake outside the code; the command line prints it in one line and exits with 2."""


class ConfigError(MedmaskError):
    """A config key, or a combination of keys, that breaks a rule."""


class DataError(MedmaskError):
    """A data file, a label or an image that breaks a rule."""


class CheckpointError(MedmaskError):
    """A weights or checkpoint file that cannot be used."""


class LaunchError(MedmaskError):
    """A job that could not be started, or that ended without its outputs."""


class Stopped(MedmaskError):
    """A training run was told to stop and has saved its state; running it again goes on from there."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """Text for an error about an unknown name: the closest choice if there is one, then all of them."""
    known = sorted(str(choice) for choice in choices)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}choices: {', '.join(known) or 'none'}"


def lookup(table: Mapping[str, T], name: str, where: str) -> T:
    """Return `table[name]`; ConfigError with the choices when there is no such name."""
    if name not in table:
        raise ConfigError(f"{where}: unknown name {name!r}; {suggest(name, table)}")
    return table[name]


def listing(problems: list[str], most: int = 20) -> str:
    """Join the problems of one file, one a line, and count those left out."""
    shown = problems[:most]
    if len(problems) > most:
        shown.append(f"... and {len(problems) - most} more")
    return "\n  ".join(shown)
