"""From what is on disk to a checked table of images: one function a kind of source, all of the same form.

A reader gets the dataset's folder (resolved) and the settings. That folder may itself be a link, since data roots are
often made of links; no path inside it may lead out of it.
"""

import gzip
import importlib.util
import logging
import math
import posixpath
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.datasets import load_digits

from medmask.config.data import Dataset
from medmask.data.isic import read_isic2019
from medmask.data.pack import SUFFIXES, load_image
from medmask.data.tables import Source, check_table, inside, read_lists, read_table, refuse
from medmask.errors import ConfigError, DataError, suggest

log = logging.getLogger(__name__)

SIDE_FOLDERS = ("train", "val", "test")
MAGIC = {"images": 0x803, "labels": 0x801}  # unsigned bytes in three dimensions, in one


def read_source(data_root: Path, cfg: Dataset) -> Source:
    """Read a dataset with its reader, then keep, merge and order its classes as the settings say."""
    if cfg.reader != "digits":  # comes with scikit-learn: needs no data root
        for folder in (data_root, data_root / cfg.folder):
            if not folder.is_dir():
                raise DataError(f"{folder.absolute()}: no such data folder; name yours: `--config data_root=...`")
    source = READERS.get(cfg.reader, read_function)((data_root / cfg.folder).resolve(), cfg)
    if cfg.folder:
        source = replace(source, table=source.table.assign(path=f"{cfg.folder.rstrip('/')}/" + source.table["path"]))
    return choose_classes(source, cfg)


def read_digits(root: Path, cfg: Dataset) -> Source:
    """The 1,797 handwritten digits (8x8 pixels) that come with scikit-learn."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8), 0..16 -> 0..255
    ids = [f"digits-{row:04d}" for row in range(len(pixels))]
    table = plain_table(ids, [f"load_digits#{row}" for row in range(len(ids))], digits.target)
    problems: list[str] = []
    lists = own_lists(root, cfg, ids, problems)
    return Source(table, tuple("0123456789"), lambda row: pixels[row], lists, problems=problems)


def read_mnist(root: Path, cfg: Dataset) -> Source:
    """The four IDX files of MNIST, or of a dataset in its form, gzip or not; lists `train` and `test`."""
    pixels, tables, lists, problems = [], [], {}, []
    for side, prefix in (("train", "train"), ("test", "t10k")):
        images_file, images = read_idx(root, f"{prefix}-images-idx3-ubyte", "images")
        labels_file, labels = read_idx(root, f"{prefix}-labels-idx1-ubyte", "labels")
        if len(images) != len(labels):
            raise DataError(f"{images_file}: {len(images)} images, but {labels_file.name} has {len(labels)} labels")
        bad = np.flatnonzero(labels > 9)
        problems += [f"{labels_file}: item {row}: label {labels[row]} is not in 0..9" for row in bad]
        ids = [f"mnist-{side}-{row:05d}" for row in range(len(images))]
        tables.append(plain_table(ids, [f"{images_file.name}#{row}" for row in range(len(ids))], labels))
        pixels += list(images)
        lists[side] = ids
    table = pd.concat(tables, ignore_index=True)
    check_table(root, table, problems)
    lists |= own_lists(root, cfg, list(table["image_id"]), problems)
    return Source(table, tuple("0123456789"), lambda row: pixels[row], lists, problems=problems)


def read_idx(root: Path, name: str, kind: str) -> tuple[Path, np.ndarray]:
    """One IDX file as uint8 array, (N, H, W) images or (N,) labels; DataError when magic or length are wrong."""
    given = [file for file in (name, f"{name}.gz") if (root / file).exists()]
    if not given:
        raise DataError(f"{root}: need a file {name} or {name}.gz")
    path = inside(root, given[0])
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    header_bytes = 4 * (1 + (MAGIC[kind] & 0xFF))  # the magic, and one size an axis
    magic, *shape = (int.from_bytes(content[start : start + 4], "big") for start in range(0, header_bytes, 4))
    if len(content) < header_bytes or magic != MAGIC[kind]:
        raise DataError(f"{path}: need IDX {kind} (magic {MAGIC[kind]:#010x}), got {content[:4].hex() or 'nothing'}")
    data = np.frombuffer(content, dtype=np.uint8, offset=header_bytes)
    if len(data) != math.prod(shape):
        raise DataError(f"{path}: the header promises {shape}, but {len(data)} bytes follow")
    return path, data.reshape(shape)


def read_folders(root: Path, cfg: Dataset) -> Source:
    """`[train|val|test/]CLASS/IMAGE`; classes in alphabetical order; files with `_mask` in their stem are left out."""
    folders = visible_folders(root)
    sides = [folder for folder in folders if folder.name in SIDE_FOLDERS]
    if sides and len(sides) < len(folders):
        others = ", ".join(folder.name for folder in folders if folder not in sides)
        raise DataError(f"{root}: need folders of classes, or only train, val and test; got both ({others})")
    class_folders = [folder for side in sides for folder in visible_folders(side)] if sides else folders
    found, left_out = [], 0
    for folder in class_folders:
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() not in SUFFIXES or "_mask" in path.stem or path.name.startswith("."):
                left_out += 1
                continue
            found.append((path.relative_to(root).as_posix(), folder.name))
    if left_out:
        log.info("%s: %d masks and other files left out", root, left_out)
    paths = [path for path, _ in found]
    table = plain_table(paths, paths, [name for _, name in found])
    problems: list[str] = []
    check_table(root, table, problems)
    lists = {side.name: [path for path in paths if path.startswith(f"{side.name}/")] for side in sides}
    classes = tuple(sorted({folder.name for folder in class_folders}))
    lists |= own_lists(root, cfg, paths, problems)
    return Source(table, classes, lambda row: load_image(root, paths[row]), lists, problems=problems)


def visible_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_csv(root: Path, cfg: Dataset) -> Source:
    """A table with `image_path`, `label` or `label_cat`, and maybe `group`, `split` and `image_id`."""
    table = inside(root, str(cfg.labels))
    problems: list[str] = []
    frame = read_table(table, (), problems)
    return frame_source(table, frame, [f"{table}:{line}" for line in frame.index], problems, root, cfg)


def read_function(root: Path, cfg: Dataset) -> Source:
    """What a user's function `file.py:function` returns for the data folder: a frame like the table of `read_csv`."""
    file, _, name = cfg.reader.rpartition(":")
    if not Path(file).is_file():
        raise ConfigError(f"data.reader: no such file: {file}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None  # the config takes only names that end in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name, None)
        if not callable(function):
            raise ConfigError(f"data.reader: {file} has no function {name!r}")
        frame = function(root)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises is the user's to mend
        log.info("traceback of %s", cfg.reader, exc_info=error)
        raise DataError(f"{cfg.reader}: failed: {type(error).__name__}: {error}") from error
    if not isinstance(frame, pd.DataFrame):
        raise DataError(f"{cfg.reader}: need a pandas DataFrame back, got {type(frame).__name__}")
    if not frame.columns.is_unique:
        raise DataError(f"{cfg.reader}: a column name stands twice; the columns are {', '.join(map(str, frame))}")
    frame = frame.reset_index(drop=True)
    text = frame.astype("str").mask(frame.isna(), "")
    if "image_path" in text:  # paths made from the folder that the function was given are as good as relative ones
        text["image_path"] = text["image_path"].str.removeprefix(f"{root / (cfg.images or '')}/")
    return frame_source(cfg.reader, text, [f"{cfg.reader}: row {row}" for row in text.index], [], root, cfg)


def frame_source(
    name: object, frame: pd.DataFrame, where: list[str], problems: list[str], root: Path, cfg: Dataset
) -> Source:
    """Check a frame of text columns and turn it into a Source; `where` names its rows in errors."""
    label = next((column for column in ("label", "label_cat") if column in frame), None)
    if label is None or "image_path" not in frame:
        missing = ["image_path"] * ("image_path" not in frame) + ["label or label_cat"] * (label is None)
        raise DataError(f"{name}: missing column {' and '.join(missing)}; the columns are {', '.join(map(str, frame))}")
    paths = [posixpath.join(cfg.images or "", path) for path in frame["image_path"]]
    table = plain_table(frame.get("image_id", frame["image_path"]), paths, frame[label])
    table["group"] = list(frame.get("group", table["group"]))
    table["where"] = where
    check_table(name, table, problems)
    lists: dict[str, list[str]] = {}
    for image, sides in zip(table["image_id"], frame.get("split", [""] * len(frame)), strict=True):
        for side in filter(None, sides.split(";")):
            lists.setdefault(side, []).append(image)
    lists |= own_lists(root, cfg, list(table["image_id"]), problems)
    classes = class_order(table["class_name"])
    return Source(table, classes, lambda row: load_image(root, paths[row]), lists, closed=False, problems=problems)


def class_order(names: pd.Series) -> tuple[str, ...]:
    """The distinct names, by number when all are whole numbers, else by alphabet."""
    distinct = set(names)
    return tuple(sorted(distinct, key=(lambda name: (int(name), name)) if all(map(is_count, distinct)) else None))


def is_count(text: str) -> bool:
    return text.isascii() and text.isdigit()


def plain_table(image_ids, paths, class_names) -> pd.DataFrame:
    """A Source's table without groups, of images that no table lists."""
    table = pd.DataFrame({"image_id": list(image_ids), "path": list(paths), "class_name": list(map(str, class_names))})
    return table.assign(group="", where="").astype("str")


def own_lists(root: Path, cfg: Dataset, image_ids: list[str], problems: list[str]) -> dict[str, list[str]]:
    """The lists that the settings name: files with one image id a row."""
    files = {name: inside(root, file) for name, file in cfg.lists.items()}
    return read_lists(files, {image: image for image in image_ids}, problems=problems)


def choose_classes(source: Source, cfg: Dataset) -> Source:
    """Apply `classes` and `relabel`.

    Images of other classes are left out, and counted in the log, where the source itself says which classes there are.
    Where classes are free text in a table (csv, a function), any other text is an error: it may be a slip of the pen.
    """
    wanted = cfg.relabel or {name: (name,) for name in cfg.classes or ()}
    if not wanted:
        return source
    key = "relabel" if cfg.relabel else "classes"
    pairs = [(str(old), new) for new, olds in wanted.items() for old in olds]
    new_name = dict(pairs)
    if len(new_name) < len(pairs) or len(cfg.classes or ()) > len(wanted):
        raise ConfigError(f"data.{key}: a class stands there twice")
    strange = [old for old in new_name if old not in source.classes] if source.closed else []
    refuse(f"data.{key}", [f"unknown class {old!r}; {suggest(old, source.classes)}" for old in strange])
    table = source.table
    known = table["class_name"].isin(new_name)
    problems = [*source.problems]
    if source.closed:
        for name, count in table[~known]["class_name"].value_counts().items():
            log.info("%d images of class %s left out: not in `%s`", count, name, key)
        table = table[known]
    else:
        strange_rows = table[~known & (table["class_name"] != "")]  # that a label is empty has been said
        choices = f"not in `{key}` ({', '.join(new_name)})"
        problems += [f"{row.where}: unknown label {row.class_name!r}, {choices}" for row in strange_rows.itertuples()]
    table = table.assign(class_name=[new_name.get(name, name) for name in table["class_name"]])
    kept = set(table["image_id"])
    lists = {name: [image for image in images if image in kept] for name, images in source.lists.items()}
    return replace(source, table=table, classes=tuple(wanted), lists=lists, problems=problems)


READERS: dict[str, Callable[[Path, Dataset], Source]] = {
    "digits": read_digits,
    "isic2019": read_isic2019,
    "mnist": read_mnist,
    "busi": read_folders,  # its masks carry `_mask` in their names
    "folders": read_folders,
    "csv": read_csv,
}
