"""Every finetuning of the papers of label noise, stopped or killed in the middle, leaves the files of a whole run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from pydantic import TypeAdapter

from medmask import cli
from medmask.config.finetuning import AnyFinetuning
from medmask.errors import Stopped
from medmask.stages import finetune
from medmask.train.checkpoint import Checkpointer
from medmask.train.signals import StopFlag
from tests.toy import OUTPUTS, StopAfter, wait_for, write_data

ROOT = Path(__file__).parents[2]
FILES = {**OUTPUTS, "weights": "weights.csv", "soft_labels": "soft_labels.csv"}
SHORT = {"epochs": 3, "batch_size": 8}


def blocks() -> dict[str, dict[str, Any]]:
    """The finetunings of both files by name, and one with the whole meta set in each step."""
    papers = [ROOT / "config" / "papers" / f"noisy_labels_{name}.yaml" for name in ("small", "ablations")]
    found = [item for path in papers for item in yaml.safe_load(path.read_text())["finetunings"].items()]
    return dict(found) | {"whole meta set": {**dict(found)["mnist_clamp"], "meta": {"size": None}}}


def settings(name: str) -> Any:
    return TypeAdapter(AnyFinetuning).validate_python({**blocks()[name], **SHORT})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), n_meta=20)


@pytest.fixture(scope="module")
def audit(tmp_path_factory, data):
    table = pd.read_csv(data["labels"]).merge(pd.read_csv(data["split"]), on="image_id").query("side == 'train'")
    rows = {"position": table["position"], "given": "c" + table["noisy_label"].astype(str), "quality": 0.25}
    rows |= {"is_error": table["is_flipped"], "is_flipped": table["is_flipped"]}
    path = tmp_path_factory.mktemp("audit") / "audit.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, data):
    """A network of each kind, trained as the plain rows are."""
    folder = tmp_path_factory.mktemp("teachers")
    for name in ("mnist_erm", "isic_erm"):
        run(folder / name, name, data)
    return {name: folder / name / "model.safetensors" for name in ("mnist_erm", "isic_erm")}


@pytest.fixture
def loaded(monkeypatch):
    """What trainings have found to go on from, in their order."""
    found: list[Any] = []
    load = Checkpointer.load
    monkeypatch.setattr(Checkpointer, "load", lambda self: found.append(load(self)) or found[-1])
    return found


def run(folder: Path, name: str, data: dict[str, Path], stop: Any = None, **inputs: Path) -> None:
    folder.mkdir(exist_ok=True)
    files = {
        **dict.fromkeys(finetune.OPTIONAL),
        **data,
        **inputs,
        **{key: folder / file for key, file in FILES.items()},
    }
    finetune.run(
        settings(name),
        work_dir=folder / "work",
        checkpoint_min=15,
        stop=stop or StopFlag(),
        check=lambda: None,
        **files,
    )


def inputs_of(name: str, audit: Path, teachers: dict[str, Path]) -> dict[str, Path]:
    block = blocks()[name]
    found = {"audit": audit} if block["method"] == "confident" else {}
    return found | ({"teacher": teachers[block["teacher"]["finetune"]]} if "teacher" in block else {})


def content(folder: Path) -> dict[str, Any]:
    """What a training left, without what the clock says."""
    found: dict[str, Any] = {name: (folder / file).read_bytes() for name, file in FILES.items()}
    lines = [json.loads(line) for line in found["history"].decode().splitlines()]
    record = json.loads(found["record"])
    found["history"] = [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]
    found["record"] = {key: record[key] for key in ("epochs", "steps", "images_seen", "notes")}
    return found


@pytest.mark.parametrize("name", blocks())
def test_stopped_in_the_second_epoch_and_started_again(name, tmp_path, data, audit, teachers, loaded):
    inputs = inputs_of(name, audit, teachers)
    run(tmp_path / "whole", name, data, **inputs)
    steps = content(tmp_path / "whole")["record"]["steps"]
    with pytest.raises(Stopped):
        run(tmp_path / "parts", name, data, stop=StopAfter(steps // 2), **inputs)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    run(tmp_path / "parts", name, data, **inputs)
    assert steps // 3 < loaded[-1]["state"]["step"] < 2 * steps // 3
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist_clamp", "mnist_soft", "isic_proposal_soft", "isic_pooled"])
def test_killed_and_started_again(name, tmp_path, data, loaded):
    cfg = json.dumps({**blocks()[name], **SHORT, "epochs": 10})

    def command(folder: Path) -> list[str]:
        files = {**data, **{key: folder / file for key, file in FILES.items()}, "work_dir": folder / "work"}
        flags = [f"--{key.replace('_', '-')}={path}" for key, path in files.items()]
        return ["finetune", "--config", cfg, "--checkpoint-min", "0.0001", *flags]

    assert cli.main(command(tmp_path / "whole")) == 0
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "medmask", *command(tmp_path / "parts")]
    with subprocess.Popen(words, env=environ, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: any((tmp_path / "parts" / "work").glob("checkpoint-*.pt")))
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert cli.main(command(tmp_path / "parts")) == 0
    assert loaded[-1]["state"]["step"] > 0
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
