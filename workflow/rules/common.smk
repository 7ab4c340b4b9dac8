# Load the config, build the artifacts, and look things up in them. No torch and no numpy: every job parses this.
import gc
import json
import re
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
gc.freeze()  # the plan stays, and a DAG has few cycles: collecting took a quarter of the dry run of 1,000 runs
gc.set_threshold(10_000)

# `python` in the rules is the interpreter that runs this, on a node too
shell.prefix(f"set -euo pipefail; export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; ")


ANY_KEY = "[A-Za-z0-9._-]+-[0-9a-f]{12}"


wildcard_constraints:
    key=ANY_KEY,
    experiment="|".join(EXPERIMENTS),


def artifact(stage, key):
    return PLAN.artifacts[stage][key]


def by_ranks(stage):
    """Regexes of the keys that one process trains, and of those that several train; the fewer ones are listed."""
    several = [key for key, made in PLAN.artifacts[stage].items() if made.settings.get("ranks", 1) > 1]
    single = [key for key in PLAN.artifacts[stage] if key not in set(several)]
    listed = "|".join(map(re.escape, min(several, single, key=len))) or "(?!)"
    others = f"(?!(?:{listed})/){ANY_KEY}"
    return (others, listed) if len(several) <= len(single) else (listed, others)


def upstream(stage, role, name):
    """Input function: a file of the artifact that plays `role` for this one."""
    return lambda wc: f"{artifact(stage, wc.key).inputs[role].folder}/{name}"


def weights_of(made, role):
    """File of the network that plays `role`: of its last epoch, or of the best one where the settings say so."""
    epoch = made.settings.get("checkpoint", "last") if role in ("init", "model") else "last"
    return f"{made.inputs[role].folder}/{'best' if epoch == 'best' else 'model'}.safetensors"


def data_files(inputs):
    """Images and split of an artifact, by role."""
    return {
        "images": f"{inputs['data'].folder}/images.npy",
        "index": f"{inputs['data'].folder}/index.npy",
        "split": f"{inputs['split'].folder}/split.csv",
        "summary": f"{inputs['split'].folder}/split.json",
    }


def mask_inputs(wc):
    """Input function: data, the network whose saliency maps are wanted, and the maps of the rounds before."""
    made = artifact("mask", wc.key)
    named = data_files(made.inputs) | {"model": weights_of(made, "model")}
    if "earlier" in made.inputs:
        named["earlier"] = f"{made.inputs['earlier'].folder}/maps.safetensors"
    return named


def settings(stage):
    """Params function: the settings of an artifact as JSON."""
    return lambda wc: io.to_json(artifact(stage, wc.key).settings)


def training_inputs(stage):
    """Input function: data, labels, and the networks that a training starts from."""

    def files(wc):
        made = artifact(stage, wc.key)
        inputs, named = made.inputs, {}
        if "data" in inputs:
            named |= data_files(inputs)
            named["labels"] = f"{inputs['noise'].folder}/labels.csv"
        if "masks" in inputs:
            named["maps"] = f"{inputs['masks'].folder}/maps.safetensors"
        if "audit" in inputs:
            named["audit"] = f"{inputs['audit'].folder}/audit.csv"
        return named | {role: weights_of(made, role) for role in ("init", "teacher") if role in inputs}

    return files


def before_masks(wc):
    """Input function: for selective classification, the network that the first finetuning on masked images started from."""
    inputs = artifact("evaluate", wc.key).inputs
    if "init" not in inputs:
        return []
    masked = inputs["model"]
    while "masks" in masked.inputs["init"].inputs:
        masked = masked.inputs["init"]
    return weights_of(masked, "init")


def fold_networks(wc):
    """Input function: the trainings that left out one fold each, in the order of the folds."""
    made = artifact("audit", wc.key)
    return [f"{made.inputs[f'fold{fold}'].folder}/model.safetensors" for fold in range(made.settings["folds"])]


def training_flags(wc, input):
    return " ".join(f"--{role} {shlex.quote(str(path))}" for role, path in input.items())
