"""Readers: what they find in each layout, and what they say about bad input."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmask.config.data import Dataset
from medmask.data.pack import write_pack
from medmask.data.readers import READERS, read_source
from medmask.errors import ConfigError, DataError, MedmaskError

HEADER = "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK"


def row(image: str, label: int, width: int = 9) -> str:
    return ",".join([image, *("1.0" if column == label else "0.0" for column in range(width))])


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


def isic(root: Path, lines: list[str], end: str = "\n", name: str = "labels.csv") -> Dataset:
    (root / name).write_bytes((end.join(lines) + end).encode())
    (root / "ISIC_2019_Training_Input").mkdir(exist_ok=True)
    return Dataset(reader="isic2019", labels=name)


def table(root: Path, *lines: str, **settings) -> Dataset:
    (root / "table.csv").write_text("\n".join(lines) + "\n")
    return Dataset(reader="csv", labels="table.csv", **settings)


def error(root: Path, cfg: Dataset, kind: type[MedmaskError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        write_pack(read_source(root, cfg), root / "images.npy", root / "index.npy", None)
    return str(caught.value)


def test_readers_are_those_of_the_config():
    from medmask.config.base import READERS as NAMES

    assert set(READERS) == set(NAMES)


# digits, mnist


def test_digits(tmp_path):
    source = read_source(tmp_path / "no such folder", Dataset(reader="digits"))
    assert len(source.table) == 1797
    assert source.table["image_id"].iloc[[0, -1]].tolist() == ["digits-0000", "digits-1796"]
    assert source.table["class_name"].iloc[:4].tolist() == ["0", "1", "2", "3"]
    first = source.load(0)
    assert first.shape == (8, 8)
    assert first[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0, 0, 5, 13, 9, 1, 0, 0 of 16


def write_idx(path: Path, array: np.ndarray, magic: int | None = None) -> None:
    header = [magic or 0x800 + array.ndim, *array.shape]
    content = np.array(header, dtype=">u4").tobytes() + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(root: Path, suffix: str = "") -> np.ndarray:
    images = np.arange(5 * 2 * 3).reshape(5, 2, 3)
    write_idx(root / f"train-images-idx3-ubyte{suffix}", images[:3])
    write_idx(root / f"train-labels-idx1-ubyte{suffix}", np.array([7, 0, 7]))
    write_idx(root / f"t10k-images-idx3-ubyte{suffix}", images[3:])
    write_idx(root / f"t10k-labels-idx1-ubyte{suffix}", np.array([1, 2]))
    return images


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist(tmp_path, suffix):
    images = write_mnist(tmp_path, suffix)
    source = read_source(tmp_path, Dataset(reader="mnist"))
    assert source.table["image_id"].tolist() == [
        "mnist-train-00000", "mnist-train-00001", "mnist-train-00002", "mnist-test-00000", "mnist-test-00001",
    ]  # fmt: skip
    assert source.table["class_name"].tolist() == ["7", "0", "7", "1", "2"]
    assert source.table["path"].iloc[3] == f"t10k-images-idx3-ubyte{suffix}#0"
    assert source.lists["test"] == ["mnist-test-00000", "mnist-test-00001"]
    assert all((source.load(number) == images[number]).all() for number in range(5))


def test_mnist_mistakes(tmp_path):
    cfg = Dataset(reader="mnist")
    assert "need a file train-images-idx3-ubyte or train-images-idx3-ubyte.gz" in error(tmp_path, cfg)
    write_mnist(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    write_idx(labels, np.array([1, 2]))
    assert "3 images, but train-labels-idx1-ubyte has 2 labels" in error(tmp_path, cfg)
    write_idx(labels, np.array([1, 12, 11]))
    message = error(tmp_path, cfg)
    assert f"{labels}: item 1: label 12 is not in 0..9" in message
    assert f"{labels}: item 2: label 11 is not in 0..9" in message
    write_idx(labels, np.array([1, 2, 3]), magic=0x803)
    assert "need IDX labels (magic 0x00000801), got 00000803" in error(tmp_path, cfg)
    labels.write_bytes(labels.read_bytes()[:3])
    assert "got 000008" in error(tmp_path, cfg)
    images = tmp_path / "t10k-images-idx3-ubyte"
    write_idx(labels, np.array([1, 2, 3]))
    images.write_bytes(images.read_bytes()[:-1])
    assert "the header promises [2, 2, 3], but 11 bytes follow" in error(tmp_path, cfg)
    images.unlink()
    images.with_suffix(".gz").write_bytes(gzip.compress(b"abc" * 100)[:-9])
    assert "cannot be read" in error(tmp_path, cfg)


# folders


def test_folders(tmp_path):
    for path in ("normal/a.png", "benign/b (1).png", "benign/b (1)_mask.png", "benign/c.PNG", "empty/notes.txt"):
        write_image(tmp_path / path.replace("notes.txt", "x.png"))
    (tmp_path / "empty/x.png").rename(tmp_path / "empty/notes.txt")
    write_image(tmp_path / "readme.png")
    source = read_source(tmp_path, Dataset(reader="folders"))
    assert source.classes == ("benign", "empty", "normal")
    assert source.table["image_id"].tolist() == ["benign/b (1).png", "benign/c.PNG", "normal/a.png"]
    assert source.lists == {}


def test_folders_with_sides_below_a_folder(tmp_path):
    for path in ("train/x/1.png", "test/x/1.png", "test/y/2.png"):
        write_image(tmp_path / "set" / path)
    source = read_source(tmp_path, Dataset(reader="folders", folder="set"))
    assert source.classes == ("x", "y")
    assert source.lists == {"test": ["test/x/1.png", "test/y/2.png"], "train": ["train/x/1.png"]}
    assert source.table["path"].tolist() == ["set/test/x/1.png", "set/test/y/2.png", "set/train/x/1.png"]
    write_image(tmp_path / "set/z/1.png")
    assert "got both (z)" in error(tmp_path, Dataset(reader="folders", folder="set"))


def test_missing_places(tmp_path):
    assert "nowhere: no such data folder" in error(tmp_path / "nowhere", Dataset(reader="folders"))
    message = f"{Path.cwd()}/gone: no such data folder; name yours: `--config data_root=...`"
    assert message in error(Path("gone"), Dataset(reader="folders"))
    assert "gone: no such data folder" in error(tmp_path, Dataset(reader="folders", folder="gone"))
    assert "no images" in error(tmp_path, Dataset(reader="folders"))
    assert f"no such file: {tmp_path}/none.csv" in error(tmp_path, Dataset(reader="csv", labels="none.csv"))


# isic2019


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("header", [[HEADER], []])
def test_isic(tmp_path, end, header):
    cfg = isic(tmp_path, [*header, row("ISIC_1", 1), row("ISIC_2_downsampled", 7), row("ISIC_3", 0)], end)
    for name in ("ISIC_1", "ISIC_2", "ISIC_3_downsampled"):
        write_image(tmp_path / f"ISIC_2019_Training_Input/{name}.jpg")
    (tmp_path / "ISIC_2019_Training_Metadata.csv").write_text("image,lesion_id\nISIC_1,L1\nISIC_2,L1\nISIC_3,\n")
    (tmp_path / "some.csv").write_text(row("ISIC_3_downsampled", 3) + "\n" + row("ISIC_2", 3) + "\n")
    source = read_source(tmp_path, cfg.model_copy(update={"lists": {"some": "some.csv"}}))
    assert source.table["image_id"].tolist() == ["ISIC_1", "ISIC_2_downsampled", "ISIC_3"]
    assert source.table["class_name"].tolist() == ["NV", "SCC", "MEL"]
    assert source.table["group"].tolist() == ["L1", "L1", ""]
    assert source.table["path"].tolist()[2] == "ISIC_2019_Training_Input/ISIC_3_downsampled.jpg"
    assert source.classes[-1] == "UNK"
    assert source.lists == {"some": ["ISIC_3", "ISIC_2_downsampled"]}
    assert source.load(0).size == (4, 3)


def test_isic_with_eight_columns(tmp_path):
    cfg = isic(tmp_path, [row("ISIC_1", 7, width=8)])
    write_image(tmp_path / "ISIC_2019_Training_Input/ISIC_1.jpg")
    assert read_source(tmp_path, cfg).classes == ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")


def test_isic_mistakes_are_listed_together(tmp_path):
    two = row("ISIC_2", 1).replace("0.0", "1.0", 1)
    cfg = isic(tmp_path, [HEADER, row("ISIC_1", 9), two, row("ISIC_3", 1)[:-4], row("ISIC_4", 2).replace("1.0", "yes")])
    message = error(tmp_path, cfg)
    assert "dataset: 8 problems" in message  # with the four missing images
    assert "labels.csv:2: need a single 1 among the one-hot columns, got 0" in message
    assert "labels.csv:3: need a single 1 among the one-hot columns, got 2" in message
    assert "labels.csv:4: need 10 columns, got 9" in message
    assert "labels.csv:5: need 0.0 or 1.0 in each one-hot column" in message


def test_isic_empty_lines(tmp_path):
    message = error(tmp_path, isic(tmp_path, [HEADER, row("ISIC_1", 1), "", row("ISIC_2", 1), ""]))
    assert f"{tmp_path}/labels.csv:3: empty line\n  {tmp_path}/labels.csv:5: empty line" in message


def test_isic_unknown_header_images_and_duplicates(tmp_path):
    assert "need the columns image,MEL" in error(tmp_path, isic(tmp_path, [HEADER.replace("NV", "XY")]))
    cfg = isic(tmp_path, [HEADER, row("ISIC_1", 1), row("ISIC_1", 2), row("ISIC_2", 2)])
    write_image(tmp_path / "ISIC_2019_Training_Input/ISIC_1.jpg")
    message = error(tmp_path, cfg)
    assert f"labels.csv:4: no such file: {tmp_path}/ISIC_2019_Training_Input/ISIC_2.jpg" in message
    assert "labels.csv:3: image_id 'ISIC_1': stands twice" in message
    assert "labels.csv:2" not in message


def test_isic_list_mistakes(tmp_path):
    cfg = isic(tmp_path, [row("ISIC_1", 1), row("ISIC_2", 1)])
    for number in (1, 2):
        write_image(tmp_path / f"ISIC_2019_Training_Input/ISIC_{number}.jpg")
    rows = [row("1 3 ISIC_1", 1), row("2 ISIC_2", 1), row("ISIC_9", 1), row("0 0 ISIC_1", 1), "ISIC_2"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    message = error(tmp_path, cfg.model_copy(update={"lists": {"some": "list.csv"}}))
    assert "list.csv:2: need IMAGE, `mark IMAGE` or `mark given IMAGE`" in message
    assert "list.csv:3: image 'ISIC_9' is not in the dataset" in message
    assert "list.csv:4: image 'ISIC_1' again (first in line 1)" in message
    assert "list.csv:5: need an image and 8 or 9 one-hot columns, got 1" in message


# csv and functions


def test_csv(tmp_path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"pixels/{name}.png")
    (tmp_path / "order.txt").write_text("three\nb.png\n")
    cfg = table(
        tmp_path,
        "image_path,label_cat,group,split,image_id",
        "a.png,10,p1,train;small,one",
        "b.png,9,,test,b.png",
        "c.png,10,p1,,three",
        images="pixels",
        lists={"order": "order.txt"},
    )
    source = read_source(tmp_path, cfg)
    assert source.classes == ("9", "10")  # by number
    assert source.table["path"].tolist() == ["pixels/a.png", "pixels/b.png", "pixels/c.png"]
    assert source.table["group"].tolist() == ["p1", "", "p1"]
    assert source.lists == {"train": ["one"], "small": ["one"], "test": ["b.png"], "order": ["three", "b.png"]}
    assert source.load(1).size == (4, 3)


def test_csv_bad_rows_are_all_listed(tmp_path):
    write_image(tmp_path / "in/a.png")
    write_image(tmp_path / "outside.png")
    (tmp_path / "in/link.png").symlink_to(tmp_path / "outside.png")
    rows = ["image_path,label", "a.png,x", "a.png,y", "../in/a.png,x", f"{tmp_path}/in/a.png,x", "link.png,x",
            "gone.png,x", "a.png,"]  # fmt: skip
    message = error(tmp_path, table(tmp_path / "in", *rows).model_copy(update={"folder": "in"}))
    assert "table.csv:3: image_id 'a.png': stands twice" in message
    assert "table.csv:4: path outside" in message
    assert "table.csv:5: path outside" in message
    assert "table.csv:6: path outside" in message
    assert "link.png is a link to" in message
    assert f"table.csv:7: no such file: {tmp_path}/in/gone.png" in message
    assert "table.csv:8: class_name '': empty" in message
    assert "table.csv:2" not in message


def test_csv_columns(tmp_path):
    assert "missing column image_path" in error(tmp_path, table(tmp_path, "path,label", "a,b"))
    assert "missing column label or label_cat; the" in error(tmp_path, table(tmp_path, "image_path,class", "a,b"))
    assert "a column name stands twice" in error(tmp_path, table(tmp_path, "image_path,label,label", "a,b,c"))
    assert "table.csv:3: need 2 columns, got 3" in error(tmp_path, table(tmp_path, "image_path,label", "a,b", "a,b,c"))
    assert "not CSV" in error(tmp_path, table(tmp_path, "image_path,label", 'a,"b'))
    (tmp_path / "table.csv").write_bytes(b"image_path,label\n\xff,a\n")
    assert "not UTF-8 text" in error(tmp_path, Dataset(reader="csv", labels="table.csv"))


FUNCTION = """
import pandas as pd
def read(folder):
    assert folder.is_dir()
    return pd.DataFrame({"image_path": sorted(folder.glob("*.png")), "label": [1, 0], "group": ["g", None]})
def fails(folder):
    raise KeyError("patient")
def nothing(folder):
    return [1, 2]
def stops(folder):
    raise SystemExit("no table")
def twice(folder):
    return pd.DataFrame([["a.png", "x", "y"]], columns=["image_path", "label", "label"])
def without_rows(folder):
    return pd.DataFrame({"image_path": [], "label": []})
def unlabelled(folder):
    return pd.DataFrame({"image_path": ["a.png", "b.png"], "label": ["x", None]})
"""


def test_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FUNCTION)
    for name in ("a", "b"):
        write_image(tmp_path / f"set/{name}.png")
    source = read_source(tmp_path, Dataset(reader="mine.py:read", folder="set"))
    assert source.table["image_id"].tolist() == ["a.png", "b.png"]
    assert source.table["path"].tolist() == ["set/a.png", "set/b.png"]
    assert source.table["class_name"].tolist() == ["1", "0"]
    assert source.table["group"].tolist() == ["g", ""]
    assert source.classes == ("0", "1")


@pytest.mark.parametrize(
    ("reader", "kind", "message"),
    [
        ("mine.py:fails", DataError, "mine.py:fails: failed: KeyError: 'patient'"),
        ("mine.py:nothing", DataError, "need a pandas DataFrame back, got list"),
        ("mine.py:unlabelled", DataError, "row 1: class_name '': empty"),
        ("mine.py:stops", DataError, "mine.py:stops: failed: SystemExit: no table"),
        ("mine.py:twice", DataError, "a column name stands twice; the columns are image_path, label, label"),
        ("mine.py:without_rows", DataError, "mine.py:without_rows: no images"),
        ("mine.py:absent", ConfigError, "mine.py has no function 'absent'"),
        ("yours.py:read", ConfigError, "no such file: yours.py"),
        ("broken.py:read", DataError, "SyntaxError"),
    ],
)
def test_function_mistakes(tmp_path, monkeypatch, reader, kind, message):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FUNCTION)
    Path("broken.py").write_text("def read(:")
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.png")
    assert message in error(tmp_path, Dataset(reader=reader), kind)


# classes


def test_classes_keeps_and_orders(tmp_path):
    write_mnist(tmp_path)
    source = read_source(tmp_path, Dataset(reader="mnist", classes=["7", "1", "3"]))
    assert source.classes == ("7", "1", "3")
    assert source.table["class_name"].tolist() == ["7", "7", "1"]
    assert source.lists == {"train": ["mnist-train-00000", "mnist-train-00002"], "test": ["mnist-test-00000"]}
    assert source.load(source.table.index[1])[0, 0] == 12  # the third image


def test_relabel(tmp_path):
    write_mnist(tmp_path)
    source = read_source(tmp_path, Dataset(reader="mnist", relabel={"low": [0, 1, 2, 3, 4], "high": [5, 6, 7, 8, 9]}))
    assert source.classes == ("low", "high")
    assert source.table["class_name"].tolist() == ["high", "low", "high", "low", "low"]


def test_unknown_classes(tmp_path):
    write_mnist(tmp_path)
    assert "unknown class '77'" in error(tmp_path, Dataset(reader="mnist", classes=["77"]))
    assert "twice" in error(tmp_path, Dataset(reader="mnist", classes=["7", "7"]), ConfigError)
    assert "twice" in error(tmp_path, Dataset(reader="mnist", relabel={"a": [1], "b": [1]}), ConfigError)
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"{name}.png")
    rows = ["image_path,label", "a.png,cat", "b.png,dgo", "c.png,emu"]
    message = error(tmp_path, table(tmp_path, *rows, classes=["cat", "dog"]))
    assert "table.csv:3: unknown label 'dgo', not in `classes` (cat, dog)" in message
    assert "table.csv:4: unknown label 'emu'" in message
    assert "unknown label 'emu'" in error(tmp_path, table(tmp_path, *rows, relabel={"pet": ["cat", "dgo"]}))
