# Load the config, build the artifacts, and look things up in them. No torch and no numpy: every job parses this.
import json
import shlex
import sys
from pathlib import Path

from medmask import io
from medmask.artifacts import resources as resources_of
from medmask.config.load import load_config
from medmask.errors import MedmaskError
from medmask.runs import make_plan, refuse_unavailable

try:
    PLAN = make_plan(load_config(config))
    refuse_unavailable(PLAN)
except MedmaskError as error:
    print(f"config: error: {error}", file=sys.stderr)
    sys.exit(2)
EXPERIMENTS = list(PLAN.runs)

# `python` in the rules is the interpreter that runs this, on a node too
shell.prefix(f"set -euo pipefail; export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; ")


wildcard_constraints:
    key="[A-Za-z0-9._-]+-[0-9a-f]{12}",
    experiment="|".join(EXPERIMENTS),


ONE_PROCESS = r"(?:(?!_ddp[_-])[A-Za-z0-9._-])+-[0-9a-f]{12}"
MANY_PROCESSES = r"[A-Za-z0-9._-]+_ddp[_-][A-Za-z0-9._-]+"


def artifact(stage, key):
    return PLAN.artifacts[stage][key]


def upstream(stage, role, name):
    """Input function: a file of the artifact that plays `role` for this one."""
    return lambda wc: f"{artifact(stage, wc.key).inputs[role].folder}/{name}"


def settings(stage):
    """Params function: the settings of an artifact as JSON."""
    return lambda wc: io.to_json(artifact(stage, wc.key).settings)


def needs(stage):
    """Resource functions of a stage, from the artifact's settings."""

    def resource(name):
        return lambda wc: resources_of(stage, artifact(stage, wc.key).settings)[name]

    return {name: resource(name) for name in ("gpu", "mem_mb", "runtime", "ranks")}


def cores(stage):
    return lambda wc: resources_of(stage, artifact(stage, wc.key).settings)["threads"]


def reader_file(wc):
    """The Python file of a user's own reader."""
    reader = artifact("data", wc.key).settings["reader"]
    return [reader.rsplit(":", 1)[0]] if ".py:" in reader else []


def training_inputs(stage):
    """Input function: data, labels, and the networks that a training starts from."""

    def files(wc):
        inputs = artifact(stage, wc.key).inputs
        named = {}
        if "data" in inputs:
            named["images"] = f"{inputs['data'].folder}/images.npy"
            named["index"] = f"{inputs['data'].folder}/index.npy"
            named["split"] = f"{inputs['split'].folder}/split.csv"
            named["summary"] = f"{inputs['split'].folder}/split.json"
            named["labels"] = f"{inputs['noise'].folder}/labels.csv"
        return named | {
            role: f"{inputs[role].folder}/model.safetensors" for role in ("init", "teacher") if role in inputs
        }

    return files


def training_flags(wc, input):
    return " ".join(f"--{role} {shlex.quote(str(path))}" for role, path in input.items())
