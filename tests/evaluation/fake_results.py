"""A results folder as the stages leave it, made without training: several rows, noises and seeds, one failed cell."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medmask.evaluation.scores import constant_scores
from medmask.stages.evaluate import judge, write_predictions

CLASSES = ["NV", "MEL", "BCC", "BKL", "AK", "SCC", "VASC", "DF"]
SHARES = np.array([0.5, 0.18, 0.12, 0.1, 0.05, 0.03, 0.02, 0.0])  # the last class has no test image
SKILL = {"none": 2.6, "sym20": 2.1, "sym40": 1.5}
RATES = {"none": 0.0, "sym20": 0.2, "sym40": 0.4}
NOISES = tuple(SKILL)
FAILED = ("reweight", "sym40", 1)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_test_rows(n: int) -> pd.DataFrame:
    rng = np.random.default_rng(7)
    labels = rng.choice(len(CLASSES), size=n, p=SHARES)
    group = [f"lesion{i}" for i in rng.integers(int(n * 0.9), size=n)]
    ids = [f"img{i:05d}" for i in range(n)]
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in ids]
    columns = {"test_set": "test", "image_id": ids, "group": group, "label": labels, "sha256": digests}
    return pd.DataFrame(columns).assign(side="test", position=np.arange(n))


def fake_probs(labels: np.ndarray, skill: float, seed: int) -> np.ndarray:
    """Probabilities that lean to the true class by `skill` on a common, per-image noise and a little per-seed noise."""
    shape = (len(labels), len(CLASSES))
    logits = np.random.default_rng(1).normal(size=shape) * 1.4 + np.random.default_rng(seed + 10).normal(size=shape)
    logits += np.log(SHARES + 0.02)
    logits[np.arange(len(labels)), labels] += skill
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def write_run(results: Path, plan: dict, test: pd.DataFrame, skill: float, draws: int) -> None:
    """The artifacts of one run, training files included."""
    keys, seed = plan["keys"], plan["seed"]
    folder = results / "evaluate" / keys["evaluate"]
    folder.mkdir(parents=True)
    result: dict[str, Any] = {}
    for selection, name, extra in (("last", "predictions.csv", 0.0), ("best", "predictions_best.csv", 0.15)):
        probs = fake_probs(test["label"].to_numpy(), skill + extra + 0.05 * seed, seed)
        write_predictions(folder / name, test, probs, CLASSES, Path("model.safetensors"))
        result[selection] = judge(folder / name, test, CLASSES, draws)
    result |= {"constants": {"test": constant_scores(test["label"].to_numpy(), len(CLASSES))}}
    write_json(folder / "metrics.json", result | {"epochs": {"last": 10, "best": 8}, "notes": []})
    for stage, epochs in (("pretrain", 5), ("finetune", 10)):
        if keys.get(stage):
            write_training(results / stage / keys[stage], epochs, skill, seed)


def write_training(folder: Path, epochs: int, skill: float, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines: list[dict] = []
    for epoch in range(1, epochs + 1):
        loss = 2 * np.exp(-epoch * skill / 8) + 0.1 * rng.random()
        lines += [{"step": epoch * 20 - 10 * k, "epoch": epoch, "loss/total": loss, "lr": 0.01} for k in (1, 0)]
        lines.append({"step": epoch * 20, "epoch": epoch, "val/loss": loss, "val/balanced_accuracy": 0.9 - loss / 3})
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    numbers = {"epochs": epochs, "images_seen": epochs * 2000, "parameters": 5_000_000, "seconds": 900.0}
    write_json(folder / "record.json", numbers | {"ranks": 2, "device": "cpu", "best_epoch": 8})


def write_shared(results: Path, test: pd.DataFrame) -> None:
    """Data, split and noise: shared by many runs."""
    write_json(results / "data" / "isic-d" / "dataset.json", {"classes": CLASSES})
    sides = {
        side: {"n": n, "groups": n, "classes": {}} for side, n in (("train", 2000), ("val", 400), ("meta_set", 125))
    }
    split = {"classes": CLASSES, "sides": sides, "test_sets": {"test": {"n": len(test)}}}
    crossing = {"groups": 12, "images": 14, "kept": False, "dropped": 14}
    note = "14 training images of 12 lesions of the test set were dropped."
    write_json(results / "split" / "isic-s" / "split.json", split | {"crossing": crossing, "notes": [note]})
    for noise, rate in RATES.items():
        for seed in (0, 1, 2):
            k = len(CLASSES)
            matrix = np.full((k, k), rate / (k - 1)) + np.eye(k) * (1 - rate - rate / (k - 1))
            counts = np.round(matrix * 2000 * np.maximum(SHARES, 0.01)[:, None])
            side = {"n": 2000, "flipped": int(2000 * rate), "rate": rate, "matrix": matrix.tolist()}
            value = {"classes": CLASSES, "train": side | {"counts": counts.tolist()}, "val": side}
            write_json(results / "noise" / f"isic-{noise}-s{seed}" / "transition.json", value)


def plan_run(row: str, label: str, noise: str, seed: int, pretrain: str, changes: dict[str, Any]) -> dict[str, Any]:
    name = f"{row}[{','.join(map(str, changes.values()))}]" if changes else row
    key = f"{name}-{noise}-s{seed}".replace("[", "-").replace("]", "")
    keys = {"data": "isic-d", "split": "isic-s", "noise": f"isic-{noise}-s{seed}", "finetune": key, "evaluate": key}
    noise_settings = {"kind": "symmetric", "rate": RATES[noise]} if RATES[noise] else {"kind": "none"}
    method = "reweight" if row == "reweight" else "supervised"
    training = {"method": method, "epochs": 10, "batch_size": 32, "lr": 0.01}
    fields = {"dataset": "isic", "split": "lesion", "noise": noise, "pretrain": pretrain, "finetune": row}
    return {
        **{"run": name, "row": row, "label": label, **fields, "evaluate": "default", "set": changes, "seed": seed},
        "metrics": ["accuracy", "balanced_accuracy", "auroc_macro"],
        "keys": keys | ({"pretrain": f"pre-s{seed}"} if pretrain != "none" else {}),
        "settings": {"noise": noise_settings, "finetune": training | {"seed": seed}, "evaluate": {}},
    }


def make_results(root: Path, *, n: int = 120, seeds: tuple[int, ...] = (0, 1, 2), draws: int = 200) -> Path:
    """Write everything below `root`; return the runs file. One run, FAILED, has died in its finetuning."""
    results, test = root / "results", make_test_rows(n)
    write_shared(results, test)
    rows: list[tuple[str, str, tuple[str, ...], str, list[dict], float]] = [
        ("baseline", "Baseline", NOISES, "none", [{}], 0.0),
        ("reweight", "Reweighting", NOISES[1:], "none",
         [{"finetune.weights": "clamp"}, {"finetune.weights": "sigmoid"}], 0.6),
        ("pretrained", "Pretrained & tuned", NOISES, "demo", [{}], 0.25),
    ]  # fmt: skip
    plans = []
    for row, label, noises, pretrain, cells, gain in rows:
        for noise in noises:
            for changes in cells:
                for seed in seeds:
                    plan = plan_run(row, label, noise, seed, pretrain, changes)
                    plans.append(plan)
                    if (row, noise, seed) == FAILED and changes["finetune.weights"] == "sigmoid":
                        log = root / "logs" / "finetune" / f"{plan['keys']['finetune']}.log"
                        log.parent.mkdir(parents=True)
                        log.write_text("epoch 1\n12:00:00 ERROR loss is nan\nValueError: not finite | at step 3\nbye\n")
                        continue
                    write_run(results, plan, test, SKILL[noise] + gain, draws)
    published = [
        {"run": "baseline", "where": {"noise": "sym40"}, "metric": "balanced_accuracy", "test_set": "test",
         "value": 0.55, "n": 1250, "not_comparable": None, "source": "README table"},
        {"run": "baseline", "where": {"noise": "none"}, "metric": "balanced_accuracy", "test_set": "test",
         "value": 0.73, "n": 1250, "not_comparable": "other images", "source": "README table"},
    ]  # fmt: skip
    claim = {
        "contrast": ["pretrained", "baseline"], "where": {"noise": "sym40"}, "against": {},
        "metric": "accuracy", "test_set": "test", "selection": "last", "margin": 0.0,
        "text": "Pretraining helps at 40 % noise",
    }  # fmt: skip
    table = {"columns": "noise", "metric": "balanced_accuracy", "decimals": 3, "test_set": "test", "selection": "last"}
    settings = {
        "title": "Noisy labels, small", "reference": "baseline", "published": published, "claim": claim, "table": table,
        "seeds": list(seeds), "seed_stages": ["noise", "finetune"],
    }  # fmt: skip
    path = results / "runs" / "noisy-abc" / "runs.json"
    write_json(path, {"experiment": "noisy", "settings": settings, "runs": plans})
    return path
