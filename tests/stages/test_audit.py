"""From trainings without a fold, over the audit of the labels, to a training without the errors found."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from medmask import cli
from medmask.data.tables import short_digests
from medmask.models.weights import read_model
from tests.toy import OUTPUTS, SETTINGS, write_data

pytest.importorskip("cleanlab", reason="pip install 'medmask[cleanlab]'")
FOLDS, N, EPOCHS = 3, 90, 6
TRAINING = {**SETTINGS, "epochs": EPOCHS, "lr": 0.01}
WEIGHTS = {"weights": "weights.csv", "soft-labels": "soft_labels.csv"}


def finetune(folder: Path, data: dict[str, Path], *flags: str, **changes) -> int:
    outputs = [f"--{name}={folder / 'out' / file}" for name, file in (OUTPUTS | WEIGHTS).items()]
    config = json.dumps({**TRAINING, **changes})
    given = [f"--{name}={path}" for name, path in data.items()]
    return cli.main(["finetune", "--config", config, *given, *flags, *outputs, f"--work-dir={folder / 'work'}"])


def audit(folder: Path, data: dict[str, Path], networks: list[Path], **changes) -> int:
    given = [f"--{name}={path}" for name, path in data.items()]
    outputs = [f"--audit={folder / 'audit.csv'}", f"--record={folder / 'record.json'}"]
    config = json.dumps({"folds": FOLDS, "needs": SETTINGS["needs"], **changes})
    return cli.main(["audit", "--config", config, *given, "--networks", *map(str, networks), *outputs])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """90 training images in groups of two, of which every sixth is flipped, 10 for validation and 6 trusted ones."""
    data = write_data(tmp_path_factory.mktemp("data"), n=N + 10, n_val=10, n_meta=6)
    table = pd.read_csv(data["split"], dtype=str, keep_default_na=False)
    table["group"] = [f"g{i // 2}" for i in range(len(table))]
    table.to_csv(data["split"], index=False)
    return data


@pytest.fixture(scope="module")
def networks(tmp_path_factory, data):
    folders = [tmp_path_factory.mktemp(f"fold{number}") for number in range(FOLDS)]
    for number, folder in enumerate(folders):
        assert finetune(folder, data, method="fold", fold=number, folds=FOLDS) == 0
    return [folder / "out" / "model.safetensors" for folder in folders]


@pytest.fixture(scope="module")
def audited(tmp_path_factory, data, networks):
    folder = tmp_path_factory.mktemp("audit")
    assert audit(folder, data, networks) == 0
    return folder / "audit.csv"


def train_rows(data) -> pd.DataFrame:
    table = pd.read_csv(data["split"], dtype={"image_id": str})
    return table[table["side"] == "train"]


def test_each_image_is_unseen_by_one_network_which_judges_it(data, networks, audited):
    rows, table = train_rows(data), pd.read_csv(audited)
    seen = np.stack([np.isin(short_digests(rows["sha256"]), read_model(path)[2]) for path in networks])  # (folds, n)
    assert (seen.sum(axis=0) == FOLDS - 1).all()
    assert table["image_id"].tolist() == rows["image_id"].tolist()
    assert (~seen[table["fold"], np.arange(N)]).all()
    assert (table.groupby(rows["group"].to_numpy())["fold"].nunique() == 1).all()
    assert table["fold"].value_counts().tolist() == [30, 30, 30]


def test_flipped_labels_are_found(audited):
    table, record = pd.read_csv(audited), json.loads(audited.with_name("record.json").read_text())
    assert table["is_flipped"].sum() == record["flipped"] == N // 6
    assert record["precision"] >= 0.8
    assert record["recall"] >= 0.6
    assert record["found"] == table["is_error"].sum()
    assert record["found_flipped"] == (table["is_error"] & table["is_flipped"]).sum()
    found = table[table["is_error"] == 1]
    assert (found["given"] != found["suggested"]).all()
    assert found["quality"].max() < table[table["is_error"] == 0]["quality"].median()


def test_errors_are_removed(tmp_path, data, audited, capsys):
    assert finetune(tmp_path, data, f"--audit={audited}", method="confident", folds=FOLDS) == 0
    record, found = json.loads((tmp_path / "out" / "record.json").read_text()), pd.read_csv(audited)["is_error"].sum()
    assert 0 < found < N / 3
    left_over = (N - found) % 8 == 1  # a last batch of one image is dropped
    assert record["images_seen"] == EPOCHS * (N - found - left_over)
    assert f"{found} of {N} labels are probably wrong" in record["notes"][0]
    assert record["notes"][0].endswith("errors found are left out")
    assert (tmp_path / "out" / "weights.csv").read_text().count("\n") == 1


def test_errors_are_reweighted(tmp_path, data, audited):
    changes = {"method": "confident", "folds": FOLDS, "errors": "reweight"}
    assert finetune(tmp_path, data, f"--audit={audited}", **changes) == 0
    table, weights = pd.read_csv(audited), pd.read_csv(tmp_path / "out" / "weights.csv")
    weights = weights[weights["epoch"] == EPOCHS]
    assert weights["image_id"].tolist() == table["image_id"].tolist()
    expected = np.where(table["is_error"] == 1, table["quality"], 1)
    np.testing.assert_allclose(weights["weight"], expected / expected.mean(), rtol=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    last = [line["train/auroc_weight"] for line in lines if "train/auroc_weight" in line][-1]
    assert last == pytest.approx(roc_auc_score(table["is_flipped"], -weights["weight"]), abs=1e-6)
    assert last > 0.75


def test_trusted_images_are_trained_on_and_not_judged(tmp_path, data, audited):
    changes = {"method": "confident", "folds": FOLDS, "train_on": ["train", "meta_set"], "epochs": 1}
    assert finetune(tmp_path, data, f"--audit={audited}", **changes) == 0
    found = pd.read_csv(audited)["is_error"].sum()
    n = N + 6 - found
    assert json.loads((tmp_path / "out" / "record.json").read_text())["images_seen"] == n - (n % 8 == 1)


def test_the_same_inputs_give_the_same_bytes(tmp_path, data, networks, audited):
    assert audit(tmp_path, data, networks) == 0
    assert (tmp_path / "audit.csv").read_bytes() == audited.read_bytes()


def test_networks_that_have_seen_what_they_judge_are_refused(tmp_path, data, networks, capsys):
    assert audit(tmp_path, data, networks[1:] + networks[:1]) == 2
    assert "has trained on 30 of the images whose labels it is to judge" in capsys.readouterr().err
    assert audit(tmp_path, data, networks, seed=1) == 2  # other folds
    assert "whose labels it is to judge" in capsys.readouterr().err
    assert audit(tmp_path, data, networks[:2]) == 2
    assert "--networks: need one for each of 3 folds, got 2" in capsys.readouterr().err
    assert audit(tmp_path, data, [*networks[:2], tmp_path / "none"]) == 2
    assert "--networks: no such file" in capsys.readouterr().err
    assert not (tmp_path / "audit.csv").exists()


def changed(audited: Path, folder: Path, **columns) -> Path:
    pd.read_csv(audited, dtype=str).assign(**columns).to_csv(folder / "audit.csv", index=False)
    return folder / "audit.csv"


def test_an_audit_that_does_not_fit_is_refused(tmp_path, data, audited, capsys):
    confident = {"method": "confident", "folds": FOLDS}

    def said(*flags, **changes) -> str:
        assert finetune(tmp_path, data, *flags, **changes) == 2
        return capsys.readouterr().err

    assert "--audit: needed by `method: confident`, and only there" in said(**confident)
    assert "--audit: needed by `method: confident`, and only there" in said(f"--audit={audited}")
    table = pd.read_csv(audited, dtype=str)
    lost = changed(audited, tmp_path, is_error=np.where(table["given"] == "c1", "1", table["is_error"]))
    text = said(f"--audit={lost}", **confident)
    assert "all labels c1 are probably wrong, so that no such image would be left" in text
    other = changed(audited, tmp_path, given=table["given"].to_numpy()[::-1])
    assert "judges other labels than those of this training" in said(f"--audit={other}", **confident)
    fewer = tmp_path / "audit.csv"
    table.iloc[1:].to_csv(fewer, index=False)
    assert "judges 89 images, which are not the 90 training images" in said(f"--audit={fewer}", **confident)


def test_an_audit_that_finds_nothing_changes_nothing(tmp_path, data, audited):
    nothing = changed(audited, tmp_path, is_error="0")
    assert finetune(tmp_path, data, f"--audit={nothing}", method="confident", folds=FOLDS, epochs=1) == 0
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["notes"] == [f"none of {N} labels is probably wrong: errors found are left out"]
    assert finetune(tmp_path / "plain", data, epochs=1) == 0
    plain, own = (read_model(folder / "out" / "model.safetensors")[0] for folder in (tmp_path / "plain", tmp_path))
    assert all((plain[name] == own[name]).all() for name in plain)
