"""docs/results/hidden_cues.py: how much of each class's cues the masks hide."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

FOLDER = Path(__file__).parents[1] / "docs" / "results"


def test_shares_by_class(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("hidden_cues")
    plain = torch.full((3, 3, 4, 4), 100, dtype=torch.uint8)
    cued = plain.clone()
    cued[:, :, :2, :2] = 250
    pixels = torch.cat([plain, cued])  # with its cue an image lies three rows further on
    rows = pd.DataFrame({"position": [3, 1, 5], "class_name": ["a", "a", "b"], "has_cue": [1, 0, 1]})
    masks = torch.ones(6, 1, 4, 4)
    masks[3, :, :2, :1] = 0  # half of the cue
    masks[5, :, 2:] = 0  # none of it
    reader = SimpleNamespace(
        unmasked=lambda positions: pixels[positions.copy()], pack=SimpleNamespace(index=np.zeros((6, 4)))
    )
    trained = SimpleNamespace(
        rows=lambda sides: rows,
        reader=lambda: reader,
        masks=lambda _: lambda positions, height, width: masks[positions],
    )
    monkeypatch.setattr(script, "read_training", lambda folder: trained)
    assert script.hidden_by_class(Path("x")) == {"a": 0.5, "b": 0.0}
