"""The numbers of the validation side, which choose the best epoch."""

import math

import numpy as np
import torch

from medmask.methods.base import Method
from medmask.train.distributed import DistContext
from medmask.train.loader import TrainingData, load

EVAL_BATCH = 128


def validate(method: Method, data: TrainingData, ctx: DistContext) -> dict[str, float]:
    """Mean loss, and for classifiers accuracies, over the validation side: every image once, whatever the ranks."""
    n = len(data.val)
    if n == 0:
        return {}
    method.eval()
    own = np.arange(n)[ctx.share(n)]
    columns: dict[str, list[np.ndarray]] = {}
    with torch.no_grad():
        for start in range(0, max(1, len(own)), EVAL_BATCH):
            rows = own[start : start + EVAL_BATCH]
            batch = load(data.val, rows if len(rows) else np.zeros(1, dtype=int), data.reader, epoch=None)
            for name, values in method.validation_step(batch.to(ctx.device)).items():
                columns.setdefault(name, []).append(values.double().cpu().numpy()[: len(rows)])
    table = np.stack([np.concatenate(parts) for parts in columns.values()], axis=1)  # (own, number of columns)
    whole = dict(zip(columns, ctx.gather(table, n).T, strict=True))
    numbers = {name: float(values.mean()) for name, values in whole.items() if name != "predicted"}
    if "predicted" in whole:
        is_right = whole["predicted"] == data.val.labels
        recalls = [is_right[data.val.labels == label].mean() for label in np.unique(data.val.labels)]
        numbers |= {"accuracy": float(is_right.mean()), "balanced_accuracy": float(np.mean(recalls))}
    return numbers


def is_better(new: dict[str, float], best: dict[str, float], select: str) -> bool:
    """Whether an epoch's numbers beat the best so far; the first of equals stays, without numbers the last counts."""
    if not new or not best:
        return True
    name = select if select in new else "loss"
    if math.isnan(best[name]):
        return not math.isnan(new[name])
    return new[name] < best[name] if name == "loss" else new[name] > best[name]
