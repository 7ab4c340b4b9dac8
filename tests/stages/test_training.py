"""The stages pretrain and finetune: files in, files out."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from medmask import cli, io
from medmask.errors import CheckpointError, ConfigError, DataError, Stopped
from medmask.models.backbones import build_backbone
from medmask.models.weights import load_classifier, read_model, read_momenta
from medmask.stages import finetune, pretrain, training
from medmask.stages.sides import read_sides
from medmask.train import lease, signals
from medmask.train.checkpoint import Checkpointer
from medmask.train.signals import StopFlag
from tests.toy import OUTPUTS, SETTINGS, is_same, settings, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def run(folder: Path, data: dict[str, Path], stage=finetune, cfg=None, stop=None, **inputs) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    outputs = {name: folder / file for name, file in OUTPUTS.items()}
    given = {name: data.get(name) for name in (*stage.INPUTS, *stage.OPTIONAL)}
    right = {"stop": stop or StopFlag(), "check": lambda: None}
    stage.run(cfg or settings(), **{**given, **inputs}, **outputs, work_dir=folder / "work", checkpoint_min=15, **right)
    return outputs


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    return run(tmp_path_factory.mktemp("trained"), data)


def test_declared_files_and_no_others(trained, data):
    folder = trained["model"].parent
    assert sorted(p.name for p in folder.iterdir()) == sorted([*OUTPUTS.values(), "work"])
    assert {p.name for p in (folder / "work").iterdir()} >= {"history.jsonl", "tensorboard"}
    assert trained["history"].read_text() == (folder / "work" / "history.jsonl").read_text()
    record = json.loads(trained["record"].read_text())
    assert {name: record[name] for name in ("epochs", "steps", "images_seen", "ranks", "device", "notes")} == {
        "epochs": 2, "steps": 10, "images_seen": 68, "ranks": 1, "device": "cpu", "notes": []
    }  # fmt: skip
    assert record["parameters"] == record["trainable"] == 16_848 - 2 * 16 * 9 + 2 * 513  # 1 channel, linear head
    assert set(record["best"]) == set(record["last"]) == {"loss", "accuracy", "balanced_accuracy"}
    assert 1 <= record["best_epoch"] <= 2


def test_the_model_file_says_what_it_is_and_what_it_has_seen(trained, data):
    _, spec, seen = load_classifier(trained["model"])
    assert (spec.backbone, spec.head, spec.n_classes, spec.epoch) == ("small_cnn", {"kind": "linear"}, 2, 2)
    assert spec.classes == ["c0", "c1"]
    assert spec.image["size"] == 28
    digests = [line.split(",")[5] for line in data["split"].read_text().splitlines()[1:]]
    expected = {np.uint64(int(digest[:16], 16)).astype(np.int64) for digest in digests}
    assert set(seen.tolist()) == expected
    best = json.loads(trained["record"].read_text())["best_epoch"]
    assert read_model(trained["best"])[1].epoch == best


def test_labels_are_those_that_the_settings_name(data):
    files = training.Files(**data, init=None, teacher=None, **{name: Path(file) for name, file in OUTPUTS.items()})
    table = np.array([line.split(",")[1:3] for line in data["labels"].read_text().splitlines()[1:]]).astype(int)
    noisy, _ = read_sides(settings(), files)
    true, _ = read_sides(settings(train_labels="true", validation_labels="true"), files)
    assert noisy["train"].labels.tolist() == table[:34, 1].tolist() != table[:34, 0].tolist()
    assert noisy["val"].labels.tolist() == table[34:, 1].tolist()
    assert noisy["train"].true_labels.tolist() == true["train"].labels.tolist() == table[:34, 0].tolist()
    assert true["val"].labels.tolist() == table[34:, 0].tolist()
    assert noisy["train"].positions.tolist() == list(range(34))


def test_rows_keep_the_order_of_the_split_file_and_find_their_labels_by_id(tmp_path):
    files = write_data(tmp_path)
    header, *rows = files["split"].read_text().splitlines()
    files["split"].write_text("\n".join([header, *rows[::-1]]) + "\n")
    files = training.Files(**files, init=None, teacher=None, **{name: Path(file) for name, file in OUTPUTS.items()})
    sides, _ = read_sides(settings(train_labels="true"), files)
    assert sides["train"].positions.tolist() == list(range(33, -1, -1))
    assert sides["train"].labels.tolist() == [i % 2 for i in range(33, -1, -1)]


def test_an_initial_model_is_continued(tmp_path, trained, data):
    cfg = settings(backbone=None, image=None, lr=1e-12)  # nothing moves but the batch statistics
    outputs = run(tmp_path / "a", data, cfg=cfg, init=trained["model"])
    before, _, seen = read_model(trained["model"])
    after, spec, later = read_model(outputs["model"])
    assert all(
        torch.allclose(before[name], after[name]) for name in before if "running" not in name and "num" not in name
    )
    assert spec.image["channels"] == 1
    assert later.tolist() == seen.tolist()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_two_trainings_are_one_where_the_momenta_go_on(tmp_path, data, optimizer):
    def train(name, **changes):
        cfg = settings(order="file", optimizer=optimizer, lr=0.01, **changes)
        return run(tmp_path / name, data, cfg=cfg, init=start.get("model"))

    start: dict[str, Path] = {}
    whole = train("whole", epochs=4, keep_optimizer=True)
    start = train("first", keep_optimizer=True)
    second, fresh = train("second", optimizer_state="continued", keep_optimizer=True), train("fresh")
    weights = [read_model(files["model"])[0] for files in (whole, second, fresh)]
    assert is_same(weights[0], weights[1])
    assert not is_same(weights[0], weights[2])
    assert is_same(read_momenta(whole["model"]), read_momenta(second["model"]))
    load_classifier(start["model"])
    assert not any(name.startswith("optimizer.") for name in load_file(start["best"]))


def test_momenta_that_were_not_kept(tmp_path, trained, data):
    with pytest.raises(
        ConfigError, match=r"optimizer_state: .* holds no momenta; train it with `keep_optimizer: true`"
    ):
        run(tmp_path, data, cfg=settings(optimizer_state="continued"), init=trained["model"])


def test_a_new_head_starts_without_momentum(tmp_path, data, monkeypatch):
    given = []
    real = training.fit
    monkeypatch.setattr(training, "fit", lambda *args: given.append(args[-1]) or real(*args))
    start = run(tmp_path / "a", data, cfg=settings(keep_optimizer=True))
    renamed = write_data(tmp_path / "data")  # the head fits, but its classes are others
    renamed["summary"].write_text('{"classes": ["x", "y"]}')
    run(tmp_path / "b", renamed, cfg=settings(optimizer_state="continued"), init=start["model"])
    assert given[1]
    assert {name.split(".")[0] for name in given[1]} == {"backbone"}
    three = write_data(tmp_path / "three", n_classes=3)
    run(tmp_path / "c", three, cfg=settings(optimizer_state="continued"), init=start["model"])


def test_other_classes_get_a_new_head_that_does_not_depend_on_the_backbone(tmp_path, trained, caplog):
    three = write_data(tmp_path / "data", n_classes=3)
    cfg = settings(lr=1e-12, epochs=1)
    with caplog.at_level(logging.INFO):
        started = run(tmp_path / "a", three, cfg=cfg, init=trained["model"])
    assert "a new head, since classes or head differ" in caplog.text
    assert json.loads(started["record"].read_text())["notes"]
    first, spec, seen = read_model(started["model"])
    scratch, _, _ = read_model(run(tmp_path / "b", three, cfg=cfg)["model"])
    assert spec.n_classes == 3
    assert torch.allclose(first["head.weight"], scratch["head.weight"])
    assert not torch.allclose(first["backbone.0.weight"], scratch["backbone.0.weight"])
    assert set(read_model(trained["model"])[2]) < set(seen)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"backbone": "resnet18"}, ConfigError, "backbone: resnet18 cannot start from the small_cnn of"),
        (
            {"image": {"size": 28, "channels": 3}},
            CheckpointError,
            r"0.weight: need \(16, 3, 3, 3\), got \(16, 1",
        ),
    ],
)
def test_an_initial_model_that_does_not_fit(tmp_path, trained, data, changes, kind, message):
    with pytest.raises(kind, match=message):
        run(tmp_path / "a", data, cfg=settings(**changes), init=trained["model"])
    assert [p.name for p in (tmp_path / "a").iterdir()] == []


def test_without_backbone_and_initial_model(tmp_path, data):
    with pytest.raises(ConfigError, match="backbone: needed, since there are no starting weights"):
        run(tmp_path, data, cfg=settings(backbone=None))


def test_frozen_backbone(tmp_path, trained, data):
    outputs = run(tmp_path / "a", data, cfg=settings(freeze="all"), init=trained["model"])
    before, after = read_model(trained["model"])[0], read_model(outputs["model"])[0]
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("backbone."))
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert json.loads(outputs["record"].read_text())["trainable"] == 2 * 513


def test_no_validation_images(tmp_path):
    outputs = run(tmp_path / "a", write_data(tmp_path / "data", n=20, n_val=0))
    record = json.loads(outputs["record"].read_text())
    assert (record["best_epoch"], record["best"]) == (2, {})
    assert record["notes"] == ["no validation images: the best epoch is the last one"]
    assert is_same(read_model(outputs["model"])[0], read_model(outputs["best"])[0])


def broken(tmp_path, name, change):
    files = write_data(tmp_path / "data")
    files[name].write_text(change(files[name].read_text()))
    return files


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("labels", lambda t: t.replace("i3,1,1", "i3,1,7").replace("i5,1,1", "i5,-1,1"),
         "labels.csv: 2 problems:\n  image i3: label outside 0..1\n  image i5: label outside 0..1"),
        ("labels", lambda t: t.replace("i3,1,1,0\n", ""), "no label for image i3"),
        ("labels", lambda t: t.replace("true_label", "label"), "labels.csv: missing column true_label"),
        ("labels", lambda t: t.replace("i3,1,1", "i3,1,cat"), "labels.csv: "),
        ("split", lambda t: t.replace(",train,", ",test,"), "split.csv: no images on the side train"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused(tmp_path, name, change, message):
    with pytest.raises(DataError) as error:
        run(tmp_path / "a", broken(tmp_path, name, change))
    assert message in str(error.value)


def test_ranks_matter_without_sync_bn(tmp_path, data):
    with pytest.raises(ConfigError, match="ranks: the settings say 2 and 1 processes run; without `sync_bn`"):
        run(tmp_path, data, cfg=settings(sync_bn=False, ranks=2))


def test_a_run_that_was_stopped_goes_on_and_other_settings_are_refused(tmp_path, data, trained):
    with pytest.raises(Stopped):
        run(tmp_path / "a", data, stop=StopFlag(told=True))
    assert len(Checkpointer(tmp_path / "a" / "work", "").paths()) == 1
    with pytest.raises(CheckpointError, match="belongs to other settings or inputs"):
        run(tmp_path / "a", data, cfg=settings(lr=0.01))
    outputs = run(tmp_path / "a", data, cfg=settings(workers=1))
    assert is_same(read_model(outputs["model"])[0], read_model(trained["model"])[0])


def test_pretrain_trains_like_finetune(tmp_path, data, trained):
    cfg = cli.parse_settings(json.dumps(SETTINGS), pretrain.CONFIG, "pretrain")
    outputs = run(tmp_path, data, stage=pretrain, cfg=cfg)
    assert is_same(read_model(outputs["model"])[0], read_model(trained["model"])[0])


def test_pretrain_needs_data_to_train(tmp_path, data):
    cfg = cli.parse_settings(json.dumps(SETTINGS), pretrain.CONFIG, "pretrain")
    with pytest.raises(ConfigError, match="--summary, --labels: needed to train"):
        run(tmp_path, {**data, "labels": None, "summary": None}, stage=pretrain, cfg=cfg)


def test_weights_are_loaded_and_finetuned(tmp_path, data):
    source = build_backbone("small_cnn", 1)
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pt")
    given = {"method": "weights", "source": "file", "backbone": "small_cnn", "file": str(tmp_path / "w.pt")}
    cfg = cli.parse_settings(json.dumps({**given, "image": {"size": 28, "channels": 1}}), pretrain.CONFIG, "pretrain")
    loaded = run(tmp_path / "a", {}, stage=pretrain, cfg=cfg)
    state, spec, seen = read_model(loaded["model"])
    assert is_same(state, {f"backbone.{name}": value for name, value in source.state_dict().items()})
    assert (spec.n_classes, spec.epoch, len(seen)) == (0, 0, 0)
    assert loaded["history"].read_text() == ""
    record = json.loads(loaded["record"].read_text())
    assert record["notes"] == [f"weights loaded from {tmp_path / 'w.pt'}"]
    assert record["sha256"] == io.file_digest(tmp_path / "w.pt")
    assert loaded["model"].read_bytes() == loaded["best"].read_bytes()
    outputs = run(tmp_path / "b", data, cfg=settings(backbone=None, image=None, freeze="all"), init=loaded["model"])
    after = read_model(outputs["model"])[0]
    assert all(torch.equal(after[name], value) for name, value in state.items())


def flags_of(folder: Path, data: dict[str, Path], **more: Path) -> list[str]:
    files = {
        **data,
        **more,
        **{name: folder / "out" / file for name, file in OUTPUTS.items()},
        "work-dir": folder / "work",
    }
    return [text for name, path in files.items() for text in (f"--{name.replace('_', '-')}", str(path))]


def test_from_the_command_line(tmp_path, data, capsys):
    flags = flags_of(tmp_path, data)
    assert cli.main(["finetune", "--config", json.dumps(SETTINGS), *flags]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*OUTPUTS.values(), "config.json"])
    assert not list((tmp_path / "work").glob("checkpoint-*"))  # they go once the outputs stand
    bad = {**SETTINGS, "image": {"size": 14, "channels": 1}}
    assert cli.main(["finetune", "--config", json.dumps(bad), *flags]) == 2
    line = "finetune.image.size: small_cnn needs 28, got 14"
    assert capsys.readouterr().err.splitlines()[-1] == f"medmask finetune: error: {line}"
    assert (tmp_path / "work" / "refused").read_text() == line + "\n"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*OUTPUTS.values(), "config.json"])


@pytest.mark.parametrize("published", [4, 3, 0])
def test_a_job_that_waited_trains_only_what_the_other_has_not_published(
    tmp_path, data, trained, monkeypatch, published
):
    """Snakemake, killed and started anew, submits what still runs a second time."""
    out, work = tmp_path / "out", tmp_path / "work"
    monkeypatch.setattr(signals, "stop_time", lambda environ: None)
    held_while_tidied = []
    monkeypatch.setattr(finetune, "tidy", lambda folder: held_while_tidied.append((folder / "writer.lease").exists()))

    def other_ends(seconds):
        for file in list(OUTPUTS.values())[:published]:
            shutil.copyfile(trained["model"].with_name(file), out / file)
        (work / "writer.lease").unlink()

    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with lease.writer(work, StopFlag()), monkeypatch.context() as patch:
        out.mkdir()
        (out / "model.safetensors").touch()  # an older result counts for nothing
        patch.setenv("SLURM_JOB_ID", "13")
        patch.setattr(lease.time, "sleep", other_ends)
        assert cli.main(["finetune", "--config", json.dumps(SETTINGS), *flags_of(tmp_path, data)]) == 0
    assert is_same(read_model(out / "model.safetensors")[0], read_model(trained["model"])[0])
    assert (work / "history.jsonl").exists() == (published < 4)
    assert held_while_tidied == [True] * (published < 4)
    assert not (work / "writer.lease").exists()


@pytest.mark.parametrize("method", ["reweight", "refurbish", "proposal"])
def test_methods_with_a_meta_set_from_the_command_line(tmp_path, method, capsys):
    data = write_data(tmp_path / "data", n_meta=6)
    cfg = {**SETTINGS, "method": method, "epochs": 1}
    assert cli.main(["finetune", "--config", json.dumps(cfg), *flags_of(tmp_path / "a", data)]) == 0
    _, spec, seen = load_classifier(tmp_path / "a/out/model.safetensors")
    assert (spec.n_classes, len(seen)) == (2, 54)  # the trusted images count as seen
    data = write_data(tmp_path / "data")
    assert cli.main(["finetune", "--config", json.dumps(cfg), *flags_of(tmp_path / "b", data)]) == 2
    assert f"method: {method} needs trusted images and the split has none: set `meta_set`" in capsys.readouterr().err


def test_the_upper_bound_from_the_command_line(tmp_path, trained, capsys):
    data = write_data(tmp_path / "data", n_meta=6)
    command = ["finetune", "--config", json.dumps({**SETTINGS, "method": "upper_bound", "epochs": 1})]
    assert cli.main([*command, *flags_of(tmp_path / "a", data, teacher=trained["model"])]) == 0
    assert cli.main([*command, *flags_of(tmp_path / "b", data)]) == 2
    assert "teacher: needed by `method: upper_bound`, none was given" in capsys.readouterr().err
    data = write_data(tmp_path / "three", n_meta=6, n_classes=3)
    assert cli.main([*command, *flags_of(tmp_path / "c", data, teacher=trained["model"])]) == 2
    assert "has other classes than this training: ['c0', 'c1'], not ['c0', 'c1', 'c2']" in capsys.readouterr().err


def test_sides_to_train_on(tmp_path):
    files = training.Files(
        **write_data(tmp_path, n_meta=6),
        init=None,
        teacher=None,
        **{name: Path(file) for name, file in OUTPUTS.items()},
    )
    (alone, few), (pooled, all_) = (
        read_sides(settings(train_on=sides), files) for sides in (["meta_set"], ["train", "meta_set"])
    )
    assert alone["train"].positions.tolist() == list(range(48, 54))
    assert pooled["train"].positions.tolist() == [*range(34), *range(48, 54)]
    assert (len(few), len(all_)) == (14 + 6, 54)
    assert (pooled["train"].labels != pooled["train"].true_labels).sum() == 6
    assert (alone["train"].labels == alone["train"].true_labels).all()


def test_trusted_images_that_are_training_images_too(tmp_path):
    data = write_data(tmp_path, n_meta=2)
    header, *rows = data["split"].read_text().splitlines()
    rows = [f"{row},{int(row.startswith(('i0,', 'i4,', 'i47,')))}" for row in rows]
    data["split"].write_text("\n".join([f"{header},in_meta_set", *rows]) + "\n")
    files = training.Files(**data, init=None, teacher=None, **{name: Path(file) for name, file in OUTPUTS.items()})
    sides, _ = read_sides(settings(), files)
    assert sides["meta_set"].positions.tolist() == [0, 4, 47, 48, 49]
    assert (sides["meta_set"].labels == sides["meta_set"].true_labels).all()
    assert (len(sides["train"]), sides["train"].labels[0] == sides["train"].true_labels[0]) == (34, False)
    pooled, _ = read_sides(settings(train_on=["train", "meta_set"]), files)
    assert sorted(pooled["train"].positions) == [*range(34), 47, 48, 49]
    assert (pooled["train"].labels != pooled["train"].true_labels).sum() == 5


def test_what_was_learnt_of_the_images(tmp_path):
    data = write_data(tmp_path / "data", n_meta=6)
    more = {"weights": tmp_path / "out" / "weights.csv", "soft-labels": tmp_path / "out" / "soft_labels.csv"}
    cfg = {**SETTINGS, "method": "proposal", "targets": "soft", "record_every": 2, "epochs": 3}
    assert cli.main(["finetune", "--config", json.dumps(cfg), *flags_of(tmp_path, data, **more)]) == 0
    weights = pd.read_csv(more["weights"])
    assert list(weights.columns) == ["image_id", "epoch", "weight", "trust", "is_flipped"]
    assert weights["epoch"].value_counts().to_dict() == {2: 34, 3: 34}
    assert weights["image_id"].tolist()[:34] == [f"i{k}" for k in range(34)]
    assert weights[weights["is_flipped"] == 1]["image_id"].unique().tolist() == [f"i{k}" for k in range(0, 34, 6)]
    assert weights["trust"].between(0, 1).all()
    soft = pd.read_csv(more["soft-labels"])
    assert list(soft.columns) == ["image_id", "prob_c0", "prob_c1"]
    assert soft[["prob_c0", "prob_c1"]].sum(axis=1).to_numpy() == pytest.approx(np.ones(34), abs=1e-5)
    assert not (tmp_path / "work" / "per_image").exists()
    cfg = {**SETTINGS, "method": "elr"}  # its running means begin at 0
    assert cli.main(["finetune", "--config", json.dumps(cfg), *flags_of(tmp_path, data, **more)]) == 0
    soft = pd.read_csv(more["soft-labels"])
    assert soft[["prob_c0", "prob_c1"]].sum(axis=1).to_numpy() == pytest.approx(np.ones(34), abs=1e-5)
    cfg |= {"order": "fixed", "drop_last": True}  # 34 images: two are in no step
    assert cli.main(["finetune", "--config", json.dumps(cfg), *flags_of(tmp_path, data, **more)]) == 0
    soft = pd.read_csv(more["soft-labels"])
    assert soft.isna().sum().to_dict() == {"image_id": 0, "prob_c0": 2, "prob_c1": 2}
    assert cli.main(["finetune", "--config", json.dumps(SETTINGS), *flags_of(tmp_path, data, **more)]) == 0
    assert [path.read_text().count("\n") for path in more.values()] == [1, 1]


def test_a_note_where_no_label_is_flipped(tmp_path):
    data = write_data(tmp_path / "data", n_meta=6)
    cfg = settings(method="reweight", train_labels="true", epochs=1)
    record = json.loads(run(tmp_path / "a", data, cfg=cfg)["record"].read_text())
    note = "no training label is flipped, so nothing is said on how well weights or trusts find them"
    assert note in record["notes"]
