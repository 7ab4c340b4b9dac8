"""Write down the runs of an experiment: what `aggregate` reads instead of a list of files."""

from pathlib import Path
from typing import Any

from medmask import io
from medmask.config.base import Block, Name
from medmask.config.load import load_config
from medmask.errors import lookup
from medmask.runs import make_plan


class RunsConfig(Block):
    """A whole config file and the experiment in it."""

    experiment: Name
    config: dict[str, Any]


CONFIG, INPUTS, OPTIONAL, OUTPUTS = RunsConfig, (), (), ("runs",)


def run(cfg: RunsConfig, *, runs: Path) -> None:
    """Expand the config and write the experiment's runs as JSON."""
    plan = make_plan(load_config(cfg.config))
    lookup(plan.runs, cfg.experiment, "experiment")
    io.write_json(runs, plan.experiment_file(cfg.experiment))
