"""Collect the tables of a finished paper: `python docs/results/collect.py config/papers/<paper>.yaml`.

Writes docs/results/<paper>.md, with the command, commit and machine, and the figures beside it. What stands in a file
<paper>.notes.md, on what a table shows and what it does not, is put in front of the tables.
"""

import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SPECIAL = {  # figures that only some experiments have
    "weights": "what weights and trusts tell of flipped labels",
    "curves": "loss, validation and what becomes of flipped images by epoch",
    "coverage": "errors by coverage",
    "panels": "what the worst and the best masks leave to look at",
}
LEARNS = ("reweight", "refurbish", "proposal", "upper_bound")  # methods with weights or trusts


def main(config: Path) -> None:
    paper = config.stem
    experiments = yaml.safe_load(config.read_text())["experiments"]
    command = f"snakemake --profile profiles/local --configfile {config} --config data_root=DATA"
    lines = [f"# {paper}", "", "```bash", command, "```", ""]
    lines += [provenance(list(experiments)), ""]
    notes = HERE / f"{paper}.notes.md"
    lines += [notes.read_text().strip(), ""] if notes.exists() else []
    for name in experiments:
        folder = Path("results", name)
        table = (folder / "table.md").read_text().replace("\n# ", "\n## ").strip()
        claim = (folder / "claim.md").read_text().replace("# Claim", "### Claim").strip()
        figure = HERE / f"{paper}-{name}.png"
        shutil.copyfile(folder / "figures" / "metric.png", figure)
        lines += [f"#{table}", "", f"![metric by method]({figure.name})", ""]
        lines += special_figures(folder, f"{paper}-{name}")
        lines += [claim, ""]
        shutil.copyfile(folder / "summary.csv", HERE / f"{paper}-{name}.csv")
    (HERE / f"{paper}.md").write_text("\n".join(lines).rstrip() + "\n")


def special_figures(folder: Path, name: str) -> list[str]:
    """Copy the figures that the runs of an experiment have something for, and the lines that show them."""
    settings = [run["settings"] for run in runs_of(folder)]
    shown = {
        "weights": any(weighs(each.get("finetune", {})) for each in settings),
        "curves": any(each.get("noise", {}).get("rate") for each in settings),
        "coverage": any(each["evaluate"].get("coverages") for each in settings),
        "panels": any("mask" in each for each in settings),
    }
    lines = []
    for what, caption in SPECIAL.items():
        if shown[what]:
            shutil.copyfile(folder / "figures" / f"{what}.png", HERE / f"{name}.{what}.png")
            lines += [f"![{caption}]({name}.{what}.png)", ""]
    return lines


def weighs(training: dict[str, Any]) -> bool:
    """Whether a finetuning gives its images weights or trusts."""
    return training.get("method") in LEARNS or training.get("errors") == "reweight"


def runs_of(folder: Path) -> list[dict[str, Any]]:
    """The runs that an experiment's table is of."""
    plan = json.loads((folder / "config.json").read_text())["inputs"]["runs"]
    return json.loads(Path(plan).read_text())["runs"]


def provenance(experiments: list[str]) -> str:
    """Commits, machine and time behind the tables."""
    folders = set()
    for name in experiments:
        for run in runs_of(Path("results", name)):
            folders |= {Path("results", stage, key) for stage, key in run["keys"].items() if key}
    made = {folder: json.loads((folder / "config.json").read_text()) for folder in folders}
    folds = {Path(path).parent for config in made.values() for path in config.get("inputs", {}).get("networks", [])}
    commits = {config["commit"] for config in made.values()}
    found = [json.loads(path.read_text()) for folder in folders | folds if (path := folder / "record.json").exists()]
    records = [record for record in found if "ranks" in record]  # of trainings
    hours = sum(record["seconds"] * record["ranks"] for record in records) / 3600
    devices = sorted({record["device"] for record in records})
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    trained = f"{len(records)} trainings, {hours:.2f} process hours on {', '.join(devices)}"
    return (
        f"Commit{'s' * (len(commits) > 1)} {', '.join(sorted(commits))}; {trained}; "
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}."
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
