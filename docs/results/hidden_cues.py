"""How much of the cues do masks hide, by class? `python docs/results/hidden_cues.py EXPERIMENT`, beside its results.

Prints, for each masked run, the mean share of a cue's pixels that its mask hides in the training images that carry one.
"""

import sys
from pathlib import Path

import torch
from collect import runs_of

from medmask.saliency.looks import read_training

VISIBLE = 24  # of 255: resizing blurs the edge of a cue


def main(experiment: str) -> None:
    for run in runs_of(Path("results", experiment)):
        if "mask" in run["keys"]:
            shares = hidden_by_class(Path("results/finetune", run["keys"]["finetune"]))
            print(run["row"], run["dataset"], run["seed"], {name: round(share, 2) for name, share in shares.items()})


def hidden_by_class(folder: Path) -> dict[str, float]:
    """Mean share of the cues' pixels that are hidden, by class name."""
    trained = read_training(folder)
    rows = trained.rows(("train",))
    rows = rows[rows["has_cue"] == 1]
    positions, reader = rows["position"].to_numpy(), trained.reader()
    plain = reader.unmasked(positions - len(reader.pack.index) // 2).float()  # the same images without their cues
    images = reader.unmasked(positions).float()
    cue = (images - plain).abs().amax(1) > VISIBLE  # (N, H, W)
    hidden = trained.masks(positions)(positions, *images.shape[2:])[:, 0] < 0.5
    share = (hidden & cue).flatten(1).sum(1) / cue.flatten(1).sum(1)
    names = rows["class_name"].to_numpy()
    return {name: float(share[torch.from_numpy(names == name)].mean()) for name in sorted(set(names))}


if __name__ == "__main__":
    main(sys.argv[1])
