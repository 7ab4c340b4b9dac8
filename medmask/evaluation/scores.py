"""The numbers of one test set as they stand in metrics.json, and those of predictors that never look at an image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmask.evaluation.bootstrap import bootstrap, interval
from medmask.evaluation.metrics import (
    ECE_BINS,
    METRICS,
    SPECIFICITY,
    Sample,
    auroc_by_class,
    class_counts,
    confusion,
    ece_bin,
    value,
    why_undefined,
)


def score_test_set(sample: Sample, groups: Sequence[str], classes: Sequence[str], *, draws: int) -> dict[str, Any]:
    """All metrics with intervals over groups, the numbers of each class, and the confusion matrix.

    A metric that is undefined has the value null and says why. A single group gives no interval: null bounds.
    """
    reasons = {name: why_undefined(name, sample) for name in METRICS}
    defined = [name for name, why in reasons.items() if why is None]
    sampled = bootstrap(sample, groups, defined, draws=draws)
    metrics: dict[str, Any] = {}
    for name, why in reasons.items():
        if why is not None:
            metrics[name] = {"value": None, "low": None, "high": None, "why": why}
            continue
        low, high = (plain(bound) for bound in interval(sampled[name]))
        metrics[name] = {"value": value(name, sample), "low": low, "high": high}
    if "ece" in defined:
        metrics["ece"]["bins"] = reliability(sample)
    if "auroc_macro" in defined:
        metrics["auroc_macro"]["n_classes"] = len(sample.present)
    return {
        "n": len(sample.labels),
        "n_groups": len(set(groups)),
        "metrics": metrics,
        "per_class": by_class(sample, classes),
        **({} if sample.has_cue is None else {"per_group": by_group(sample, classes)}),
        "confusion": confusion(sample).tolist(),
        "absent": [name for k, name in enumerate(classes) if k not in sample.present],
    }


def plain(number: float) -> float | None:
    """A float for JSON: None for NaN."""
    return None if np.isnan(number) else float(number)


def by_class(sample: Sample, classes: Sequence[str]) -> dict[str, Any]:
    """n, recall, precision, F1 and one-vs-rest AUROC of each class; null for what a class without images has not."""
    ones = np.ones((1, len(sample.labels)))
    support, claimed, correct = (counts[0] for counts in class_counts(sample, ones))
    areas = dict(zip(sample.present.tolist(), auroc_by_class(sample, ones)[0].tolist(), strict=True))
    return {
        name: {
            "n": int(support[k]),
            "recall": correct[k] / support[k] if support[k] else None,
            "precision": correct[k] / claimed[k] if claimed[k] else None,
            "f1": 2 * correct[k] / (support[k] + claimed[k]) if support[k] else None,
            "auroc": plain(areas.get(k, np.nan)),
        }
        for k, name in enumerate(classes)
    }


def by_group(sample: Sample, classes: Sequence[str]) -> list[dict[str, Any]]:
    """n and accuracy of each group, class x cue, that has images."""
    assert sample.has_cue is not None
    rows = []
    for k in sample.present:
        for cue in (False, True):
            member = (sample.labels == k) & (sample.has_cue == cue)
            if member.any():
                accuracy = float((sample.predicted[member] == k).mean())
                rows.append({"class": classes[k], "has_cue": cue, "n": int(member.sum()), "accuracy": accuracy})
    return rows


def reliability(sample: Sample) -> list[dict[str, Any]]:
    """The bins behind the expected calibration error; null means for an empty bin."""
    confidence = sample.probs.max(axis=1)
    correct, bins = sample.predicted == sample.labels, ece_bin(confidence)
    rows = []
    for b in range(ECE_BINS):
        inside = bins == b
        rows.append(
            {
                "low": b / ECE_BINS,
                "high": (b + 1) / ECE_BINS,
                "n": int(inside.sum()),
                "confidence": float(confidence[inside].mean()) if inside.any() else None,
                "accuracy": float(correct[inside].mean()) if inside.any() else None,
            }
        )
    return rows


def constant_scores(
    labels: NDArray[np.int64], n_classes: int, has_cue: NDArray[np.bool_] | None = None
) -> dict[str, dict[str, float | None]]:
    """What is reached without looking: always the largest class (with certainty), and a guess by the class shares.

    The guess has the metrics of its expected confusion matrix: recall, precision and F1 of a class are its share.
    Its scores rank the images at random: AUROC 0.5, and 10 % sensitivity at 90 % specificity. It has no calibration.
    """
    shares = np.bincount(labels, minlength=n_classes) / len(labels)
    certain = Sample(labels, np.tile(np.eye(n_classes)[shares.argmax()], (len(labels), 1)), has_cue)
    reasons = {name: why_undefined(name, certain) for name in METRICS}
    majority = {name: value(name, certain) if why is None else None for name, why in reasons.items()}
    occurring = shares[shares > 0]
    guess: dict[str, float | None] = dict.fromkeys(METRICS, float(occurring.mean()))
    guess |= {
        "accuracy": float((shares**2).sum()),
        "auroc_macro": 0.5,
        "sensitivity_at_90_specificity": 1 - SPECIFICITY,
        "worst_group_accuracy": float(occurring.min()),
    }
    undefined = dict.fromkeys([name for name, why in reasons.items() if why is not None] + ["ece"])
    return {"majority": majority, "stratified": guess | undefined}
