"""Stage evaluate: predict the test sets with the last and the best epoch, and judge both.

Only this stage opens the test side.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medmask import io
from medmask.config.experiments import Evaluation
from medmask.config.training import Image
from medmask.data.pack import Pack
from medmask.data.tables import read_split, short_digests
from medmask.errors import CheckpointError, ConfigError, DataError, suggest
from medmask.evaluation.collect import read_predictions, test_sample
from medmask.evaluation.scores import constant_scores, score_test_set
from medmask.evaluation.selective import combine, select

if TYPE_CHECKING:
    from medmask.models.weights import ModelSpec

CONFIG = Evaluation
INPUTS: tuple[str, ...] = ("images", "index", "split", "summary", "model", "best")
OPTIONAL: tuple[str, ...] = ("init",)
OUTPUTS: tuple[str, ...] = ("predictions", "predictions_best", "metrics")

BATCH_SIZE = 256
log = logging.getLogger(__name__)


def run(
    cfg: Evaluation,
    *,
    images: Path,
    index: Path,
    split: Path,
    summary: Path,
    model: Path,
    best: Path,
    init: Path | None,
    predictions: Path,
    predictions_best: Path,
    metrics: Path,
) -> None:
    from medmask.data.images import eval_batches
    from medmask.evaluation.predict import pick_device, predict_probs
    from medmask.models.weights import load_classifier

    needed = ("position", "group", "sha256", "test_set")
    rows, classes = read_split(split, summary, needed, len(Pack.open(images, index)))
    test = choose_test_rows(rows, cfg.test_sets, split)
    notes = overlap_notes(rows, test)
    device, epochs, done = pick_device(cfg.needs), {}, {}
    for selection, weights, target in (("last", model, predictions), ("best", best, predictions_best)):
        network, spec, seen = load_classifier(weights)
        check_classes(spec, classes, weights, summary)
        notes += leak_notes(rows, test, seen, cfg.leak, weights)
        epochs[selection] = spec.epoch
        if spec.epoch not in done:
            places, row_of = np.unique(test["position"].to_numpy(), return_inverse=True)  # test sets may share images
            image = Image.model_validate(spec.image)
            done[spec.epoch] = predict_probs(network, eval_batches(images, index, places, image, BATCH_SIZE), device)
            done[spec.epoch] = done[spec.epoch][row_of]
        write_predictions(target, test, done[spec.epoch], classes, weights)
        log.info("%s epoch (%s): %d test images", selection, spec.epoch, len(test))
    result: dict[str, Any] = {"last": judge(predictions, test, classes, cfg.draws)}
    is_same = epochs["last"] == epochs["best"]  # then the two files are equal, and so are their draws
    result["best"] = result["last"] if is_same else judge(predictions_best, test, classes, cfg.draws)
    result["constants"] = {name: constants(part, len(classes)) for name, part in test.groupby("test_set", sort=False)}
    if cfg.coverages:
        names = [model] if init is None else [init, model]
        result["selective"] = judge_answers(names, images, index, rows, test, cfg)
    result |= {"epochs": epochs, "notes": list(dict.fromkeys(notes))}
    io.write_json(metrics, result)


def judge_answers(
    models: Sequence[Path], images: Path, index: Path, rows: pd.DataFrame, test: pd.DataFrame, cfg: Evaluation
) -> dict[str, Any]:
    """Coverage and error of the answers on each test set, of the last network, or of it and the one before masking."""
    from medmask.data.images import eval_batches
    from medmask.evaluation.predict import pick_device, predict_probs
    from medmask.models.weights import load_classifier

    validation = rows[rows["side"] == "val"]
    if validation.empty:
        raise DataError("evaluate.coverages: thresholds need validation images, and the split has none")
    found = []
    for path in models:
        network, spec, _ = load_classifier(path)
        image, device = Image.model_validate(spec.image), pick_device(cfg.needs)
        found.append([
            predict_probs(network, eval_batches(images, index, part["position"].to_numpy(), image, BATCH_SIZE), device)
            for part in (validation, test)
        ])  # fmt: skip
    known, scores = (combine(*pair) if len(pair) == 2 else pair[0] for pair in zip(*found, strict=True))
    return {
        str(name): select(scores[part.index], part["label"].to_numpy(), known, cfg.coverages)
        for name, part in test.groupby("test_set", sort=False)
    }


def choose_test_rows(rows: pd.DataFrame, wanted: Sequence[str] | None, split: Path) -> pd.DataFrame:
    """The rows of the test sets asked for, in the order of the split file."""
    test = rows[rows["side"] == "test"].reset_index(drop=True)
    if test.empty:
        raise DataError(f"{split}: need images on the side test, got none")
    if wanted is None:
        return test
    for name in wanted:
        if name not in set(test["test_set"]):
            raise ConfigError(f"evaluate.test_sets: unknown test set {name!r}; {suggest(name, set(test['test_set']))}")
    return test[test["test_set"].isin(wanted)].reset_index(drop=True)


def check_classes(spec: "ModelSpec", classes: list[str], weights: Path, summary: Path) -> None:
    """The network must have been trained for the classes of the split, in the same order."""
    if list(spec.classes) != classes:
        raise CheckpointError(
            f"{weights}: trained for the classes {', '.join(spec.classes)}, "
            f"but {summary} has {', '.join(classes)}; train on this split, or evaluate on the model's own"
        )


def known_to_split(rows: pd.DataFrame) -> NDArray[np.int64]:
    """Pixel digests of the images that this split itself gives to training or model choice."""
    return short_digests(rows.loc[rows["side"] != "test", "sha256"])


def overlap_notes(rows: pd.DataFrame, test: pd.DataFrame) -> list[str]:
    """A note when test images are pixel-identical to images on another side of the same split."""
    count = int(np.isin(short_digests(test["sha256"]), known_to_split(rows)).sum())
    return [f"{count} of {len(test)} test images are pixel-identical to training images of this split"] * (count > 0)


def leak_notes(rows: pd.DataFrame, test: pd.DataFrame, seen: NDArray[np.int64], leak: str, weights: Path) -> list[str]:
    """Refuse, or note, test images that the weights or their ancestors were trained on elsewhere."""
    digests = short_digests(test["sha256"])
    leaked = np.isin(digests, seen) & ~np.isin(digests, known_to_split(rows))
    if not leaked.any():
        return []
    count = f"{leaked.sum()} of {len(test)} test images"
    if leak == "count":
        return [f"{count} were among the images that the weights, or those they started from, were trained on"]
    first = ", ".join(test.loc[leaked, "image_id"].head(5))
    raise DataError(
        f"{weights}: trained on {count}, itself or through the weights it started from (first: {first}); "
        "pretrain on another split, or set `leak: count` to evaluate all the same"
    )


def write_predictions(path: Path, test: pd.DataFrame, probs: Any, classes: list[str], weights: Path) -> None:
    """One row an image, with all digits: the metrics are computed from this file, here and in later tables."""
    bad = ~np.isfinite(probs).all(axis=1)
    if bad.any():
        raise CheckpointError(
            f"{weights}: gives no finite probabilities for {bad.sum()} of {len(bad)} test images (diverged training?)"
        )
    assert probs.shape == (len(test), len(classes))
    table = test[["test_set", "image_id", "group", "label"]].assign(predicted=probs.argmax(axis=1))
    if "has_cue" in test:
        table["has_cue"] = test["has_cue"]
    scores = pd.DataFrame(probs, columns=[f"prob_{name}" for name in classes])
    pd.concat([table, scores], axis=1).to_csv(path, index=False, lineterminator="\n")


def judge(path: Path, test: pd.DataFrame, classes: list[str], draws: int) -> dict[str, Any]:
    """Scores of each test set from a predictions file, after checking that it has each test image exactly once."""
    table = read_predictions(path)
    expected, found = (list(zip(part["test_set"], part["image_id"], strict=True)) for part in (test, table))
    assert len(set(found)) == len(found), "a test image was counted twice"
    assert set(expected) == set(found), "a test image is missing"
    scores = {}
    for name in dict.fromkeys(test["test_set"]):
        sample, groups = test_sample(table, name)
        scores[name] = score_test_set(sample, groups, classes, draws=draws)
    return scores


def constants(test: pd.DataFrame, n_classes: int) -> dict[str, dict[str, float | None]]:
    cue = test["has_cue"].to_numpy().astype(bool) if "has_cue" in test else None
    return constant_scores(test["label"].to_numpy(), n_classes, cue)
