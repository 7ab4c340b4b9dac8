"""Which labels get the weight? `python docs/results/weights_by_label.py EXPERIMENT`, where its results are.

Prints a table: for each run with weights and each label the images that carry it, those of them that are flipped, and
the mean weight of the last epoch (1 is the mean of all images), over all seeds.
"""

import sys
from pathlib import Path

import pandas as pd
from collect import runs_of

from medmask.evaluation.collect import Run


def main(experiment: str) -> None:
    runs: dict[str, list[pd.DataFrame]] = {}
    for run in runs_of(Path("results", experiment)):
        weights = weights_of(Run(run, Path("results")))
        if len(weights):
            runs.setdefault(run["run"], []).append(weights)
    print("| run | label | images | flipped | mean weight |\n| --- | --- | --- | --- | --- |")
    for name, tables in runs.items():
        for label, found in pd.concat(tables).groupby("label", sort=False):
            n, flipped = len(found) / len(tables), found["is_flipped"].sum() / len(tables)
            print(f"| {name} | {label} | {n:.0f} | {flipped:.0f} | {found['weight'].mean():.3f} |")


def weights_of(run: Run) -> pd.DataFrame:
    """Label, weight and is_flipped of each training image at the last epoch; empty where nothing is weighed."""
    weights = run.weights()
    if weights.empty:
        return weights
    last = weights[weights["epoch"] == weights["epoch"].max()].dropna(subset="weight")
    labels = pd.read_csv(run.path("noise", "labels.csv"), dtype={"image_id": str})
    found = last.merge(labels[["image_id", "noisy_label"]], on="image_id").sort_values("noisy_label")
    classes = run.read("split", "split.json")["classes"]
    return found.assign(label=found["noisy_label"].map(dict(enumerate(classes))))[["label", "weight", "is_flipped"]]


if __name__ == "__main__":
    main(sys.argv[1])
