"""Artifacts: what a stage makes of settings and of other artifacts, and the key that names it. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any

from medmask import io
from medmask.config.base import Block, Needs

# Raised by hand when a default or a meaning of a stage changes, so that its artifacts get new keys.
VERSIONS = {
    "data": 1, "split": 1, "noise": 1, "pretrain": 1, "mask": 1, "audit": 1, "finetune": 1, "evaluate": 1, "runs": 1,
}  # fmt: skip
# How a thing is run, and names of other blocks, are no part of what is computed.
NOT_IN_DIGEST = {"mode", "needs", "workers", "data", "after", "masks", "teacher", "metrics"}


@dataclass(frozen=True)
class Artifact:
    """One folder `results/<stage>/<key>/`.

    settings : what the stage gets as `--config`, JSON-able. inputs : the artifacts that it reads, by role.
    backbone : network inside, for weights. trained_on : (source, data digest, split digest) of all training before it.
    """

    stage: str
    key: str
    digest: str
    settings: dict[str, Any]
    inputs: dict[str, "Artifact"] = field(default_factory=dict)
    backbone: str | None = None
    trained_on: frozenset[tuple[str, str, str]] = frozenset()

    @property
    def folder(self) -> str:
        return f"results/{self.stage}/{self.key}"


def make_artifact(
    stage: str,
    block: Block,
    *,
    name: str,
    inputs: dict[str, Artifact],
    seed: int | None = None,
    ignore: frozenset[str] = frozenset(),
    code: str | None = None,
    **more: Any,
) -> Artifact:
    """Settings, digest and key of one artifact.

    Parameters
    ----------
    name : readable part of the key, made of settings and never of block names.
    seed : None for a stage that draws nothing.
    ignore : further settings that do not change the result. code : a user's own code that makes the result.
    """
    settings = block.model_dump(mode="json", exclude_defaults=True, exclude={"mode", "data", "after", "teacher"})
    if "needs" in type(block).model_fields:
        settings.pop("needs", None)
        settings["needs"] = block.needs.model_dump(mode="json", exclude_defaults=True)  # type: ignore[attr-defined]
    if seed is not None:
        settings["seed"] = seed
        name += f"_s{seed}"
    content = {
        "stage": stage,
        "version": VERSIONS[stage],
        "settings": {key: value for key, value in settings.items() if key not in NOT_IN_DIGEST | ignore},
        "inputs": {role: artifact.digest for role, artifact in inputs.items()},
    }
    digest = io.digest(content | ({"code": code} if code else {}))
    return Artifact(stage, f"{name}-{digest[:12]}", digest, settings, inputs, **more)


def readable(text: str) -> str:
    """Text as a part of a key: letters, digits, dot and minus; `_` only between parts."""
    return "".join(char if char.isalnum() or char == "." else "-" for char in text).strip("-.") or "x"


SMALL = Needs(gpu=0, cpus=1, mem_gb=4, hours=1)
STAGE_NEEDS = {"data": Needs(gpu=0, cpus=4, mem_gb=8, hours=6), "split": SMALL, "noise": SMALL, "runs": SMALL}


def resources(stage: str, settings: dict[str, Any]) -> dict[str, int]:
    """What a job asks for: ranks, and for all ranks together gpu, threads, mem_mb; runtime in minutes."""
    needs = Needs(**settings["needs"]) if "needs" in settings else STAGE_NEEDS.get(stage, SMALL)
    ranks = int(settings.get("ranks", 1))
    return {
        "ranks": ranks,
        "gpu": needs.gpu * ranks,
        "threads": needs.cpus * ranks,
        "mem_mb": round(needs.mem_gb * 1000) * ranks,
        "runtime": round(needs.hours * 60),
    }
