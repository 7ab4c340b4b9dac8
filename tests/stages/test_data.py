"""Stage data, from the command line: what it writes, and that bad input leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medmask import cli
from medmask.data.pack import Pack, pixel_digest

OUTPUTS = {"manifest": "manifest.csv", "images": "images.npy", "index": "index.npy", "dataset": "dataset.json"}


def run(root: Path, out: Path, **config) -> int:
    files = [text for flag, name in OUTPUTS.items() for text in (f"--{flag}", str(out / name))]
    return cli.main(["data", "--config", json.dumps(config), "--data-root", str(root), *files])


@pytest.fixture
def tree(tmp_path):
    """A folder of images of several kinds and sizes; two have the same pixels."""
    root = tmp_path / "root"
    for name, image in {
        "b/1.png": Image.new("L", (8, 4), 50),
        "b/2.png": Image.new("RGB", (6, 6), (1, 2, 3)),
        "a/3.jpg": Image.new("RGB", (4, 8), (200, 0, 0)),
        "a/4.bmp": Image.new("RGB", (6, 6), (1, 2, 3)),
    }.items():
        (root / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / "set" / name)
    return root


def test_outputs(tree, tmp_path):
    out = tmp_path / "out"
    (tree / "set/order.txt").write_text("b/2.png\na/3.jpg\n")
    assert run(tree, out, reader="folders", folder="set", lists={"mine": "order.txt"}) == 0
    assert {path.name for path in out.iterdir()} == {*OUTPUTS.values(), "config.json"}
    manifest = pd.read_csv(out / "manifest.csv", keep_default_na=False, dtype={"phash": str})
    assert list(manifest) == [
        "image_id", "path", "label", "class_name", "group", "split_hint", "sha256", "width", "height", "phash",
    ]  # fmt: skip
    assert manifest["image_id"].tolist() == ["a/3.jpg", "a/4.bmp", "b/1.png", "b/2.png"]
    assert manifest["path"].tolist()[0] == "set/a/3.jpg"
    assert manifest["label"].tolist() == [0, 0, 1, 1]
    assert manifest["split_hint"].tolist() == ["mine", "", "", "mine"]
    assert manifest[["width", "height"]].values.tolist() == [[4, 8], [6, 6], [8, 4], [6, 6]]
    assert manifest["phash"].str.fullmatch("[0-9a-f]{16}").all()
    pack = Pack.open(out / "images.npy", out / "index.npy")
    assert [image.shape for image in pack] == [(8, 4, 3), (6, 6, 3), (4, 8, 1), (6, 6, 3)]
    assert [pixel_digest(image) for image in pack] == manifest["sha256"].tolist()
    assert json.loads((out / "dataset.json").read_text()) == {
        "classes": ["a", "b"],
        "n": 4,
        "counts": {"a": 2, "b": 2},
        "lists": {"mine": 2},
        "reader": "folders",
        "duplicates": [["a/4.bmp", "b/2.png"]],
        "orders": {"mine": [3, 0]},
    }


def test_resize_and_classes(tree, tmp_path):
    assert run(tree, tmp_path, reader="folders", folder="set", resize=3, classes=["b", "a"]) == 0
    pack = Pack.open(tmp_path / "images.npy", tmp_path / "index.npy")
    assert [image.shape for image in pack] == [(6, 3, 3), (3, 3, 3), (3, 6, 1), (3, 3, 3)]
    assert pd.read_csv(tmp_path / "manifest.csv")["label"].tolist() == [1, 1, 0, 0]
    assert json.loads((tmp_path / "dataset.json").read_text())["classes"] == ["b", "a"]


def test_bad_images_leave_nothing_new(tree, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(tree, out, reader="folders", folder="set") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    whole = (tree / "set/a/3.jpg").read_bytes()
    (tree / "set/a/3.jpg").write_bytes(whole[:-40])
    (tree / "set/b/1.png").write_bytes(b"")
    assert run(tree, out, reader="folders", folder="set") == 2
    message = capsys.readouterr().err
    assert "2 problems" in message
    assert "set/a/3.jpg: cannot be read as an image" in message
    assert "set/b/1.png: cannot be read as an image" in message
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"reader": "folders", "folder": "gone"}, "gone: no such data folder"),
        ({"reader": "folders", "folder": "../root"}, "need a path inside the data root"),
        ({"reader": "csv", "folder": "set", "labels": "gone.csv"}, "root/set/gone.csv"),
        ({"reader": "folders", "folder": "set", "classes": ["a"]}, "set: need images of two classes or more, got a"),
        ({"reader": "folders", "folder": "set", "classes": ["c"]}, "unknown class 'c'; choices: a, b"),
        (
            {"reader": "folders", "folder": "set", "shortcut": {"rate": {"a": 1.0}, "size": 5}},
            "data.shortcut.size: the cue of 5 pixels is larger than image 0 (4 x 8)",
        ),
        (
            {"reader": "folders", "folder": "set", "shortcut": {"rate": {"a": 1.0}, "size": 3, "margin": 1}},
            "the cue of 3 pixels and its margins of 1 is larger than image 0 (4 x 8)",
        ),
        (
            {"reader": "folders", "folder": "set", "shortcut": {"rate": {"a": 1.0}, "size": 3, "second": True}},
            "shortcut.second: two cues of 3 pixels, 0 from the edges, do not fit side by side into image 0 (4 x 8)",
        ),
        ({"reader": "folders", "folder": "set", "shortcut": {"rate": {"c": 1.0}}}, "shortcut.rate: unknown name 'c'"),
        ({"reader": "folders", "folder": "set", "shortcut": {"rate": {"a": 0.2, "b": 0.2}}}, "need rates that differ"),
        ({"reader": "folders", "folder": "set", "shortcut": {"rate": {"a": 1.2}}}, "data.shortcut.rate.a"),
    ],
)
def test_mistakes(tree, tmp_path, capsys, config, message):
    assert run(tree, tmp_path / "out", **config) == 2
    assert message in capsys.readouterr().err
    assert not any((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_digits_from_a_shell_without_torch_or_data_root(tmp_path):
    files = [text for flag, name in OUTPUTS.items() for text in (f"--{flag}", str(tmp_path / name))]
    argv = ["data", "--config", '{"reader": "digits"}', "--data-root", str(tmp_path / "gone"), *files]
    code = f"import sys; from medmask import cli; rc = cli.main({argv!r}); print(rc, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]
    assert "1797 images, 10 classes" in done.stderr
    pack = Pack.open(tmp_path / "images.npy", tmp_path / "index.npy")
    assert pack.batch(np.arange(1797)).shape == (1797, 8, 8, 1)


def test_with_cues_a_broken_image_is_named_once(tree, tmp_path, capsys):
    (tree / "set/b/1.png").write_bytes(b"no image")
    shortcut = {"rate": {"a": 1.0}, "size": 2}
    assert run(tree, tmp_path / "out", reader="folders", folder="set", shortcut=shortcut) == 2
    assert "dataset: 1 problem:\n" in capsys.readouterr().err
