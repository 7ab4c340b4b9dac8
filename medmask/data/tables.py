"""Tables on disk, and the one frame that every reader returns, checked row by row."""

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pa
from PIL import Image

from medmask import io
from medmask.errors import DataError, listing

Row = tuple[int, list[str]]  # line number in the file, fields


@dataclass(frozen=True)
class Source:
    """What a reader found, before anything is decoded.

    Attributes
    ----------
    table : DataFrame with the text columns `image_id`, `path` (relative to the dataset's folder, `file#index` inside a
        file), `class_name`, `group` ("" for none) and `where` (file and line of the table that lists the image, ""
        where none does); its index holds what `load` takes.
    classes : class names in label order, also those without images.
    load : index value -> the image, as PIL image or uint8 array (H, W); a DataError says why there is none.
    lists : name -> image ids in the list's order.
    closed : the source itself says which classes there are; otherwise any text in the table is a class.
    problems : what is wrong with the tables; raised together with what is wrong with the images.
    """

    table: pd.DataFrame
    classes: tuple[str, ...]
    load: Callable[[int], Image.Image | np.ndarray]
    lists: dict[str, list[str]]
    closed: bool = True
    problems: list[str] = field(default_factory=list)


def refuse(name: object, found: list[str], problems: list[str] | None = None) -> None:
    """Raise a DataError with all that was found wrong with `name`, one a line; return when there is nothing.

    With `problems`, add to these instead: what is wrong with several tables is then raised at once, by who began them.
    """
    if problems is not None:
        problems += found
    elif found:
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        raise DataError(f"{name}: {count}:\n  {listing(found)}")


def read_rows(path: Path, problems: list[str] | None = None) -> list[Row]:
    """Rows of a CSV file as text; CRLF or LF; empty lines are refused."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot read the table: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, [field.strip() for field in fields]) for fields in reader]
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error
    refuse(path, [f"{path}:{line}: empty line" for line, fields in rows if not any(fields)], problems)
    rows = [(line, fields) for line, fields in rows if any(fields)]
    if not rows:
        raise DataError(f"{path}: the table is empty")
    return rows


def read_table(path: Path, needed: Iterable[str], problems: list[str] | None = None) -> pd.DataFrame:
    """A CSV file with a header as text; the index holds line numbers. Lines with more or fewer columns are refused."""
    (first, header), *rows = read_rows(path, problems)
    missing = [name for name in needed if name not in header]
    if missing or len(set(header)) < len(header):
        wrong = f"missing column {', '.join(missing)}" if missing else "a column name stands twice"
        raise DataError(f"{path}:{first}: {wrong}; the columns are {', '.join(header)}")
    if not rows:
        raise DataError(f"{path}: has no rows below its header")
    uneven = [(line, len(fields)) for line, fields in rows if len(fields) != len(header)]
    refuse(path, [f"{path}:{line}: need {len(header)} columns, got {count}" for line, count in uneven], problems)
    rows = [(line, fields) for line, fields in rows if len(fields) == len(header)]
    return pd.DataFrame([fields for _, fields in rows], index=[line for line, _ in rows], columns=header, dtype=str)


def read_lists(
    files: Mapping[str, Path],
    known: Mapping[str, str],
    parse: Callable[[list[str]], str] = lambda fields: fields[0],
    problems: list[str] | None = None,
) -> dict[str, list[str]]:
    """Image ids of list files, in the files' order.

    Parameters
    ----------
    files : name -> file, one image a row.
    known : a list's name of an image -> its image id; any other name is refused.
    parse : fields of a row -> the list's name of the image; a ValueError says what is wrong with the row.
    """
    lists: dict[str, list[str]] = {}
    found: list[str] = []
    for name, path in files.items():
        seen: dict[str, int] = {}
        for line, fields in read_rows(path, found):
            try:
                image = known.get(parsed := parse(fields))
            except ValueError as error:
                found.append(f"{path}:{line}: {error}")
                continue
            if image is None:
                found.append(f"{path}:{line}: image {parsed!r} is not in the dataset")
            elif image in seen:
                found.append(f"{path}:{line}: image {parsed!r} again (first in line {seen[image]})")
            else:
                seen[image] = line
        lists[name] = list(seen)
    refuse("lists", found, problems)
    return lists


def inside(root: Path, relative: str) -> Path:
    """The file `relative` in the resolved folder `root`; a DataError when it is missing or leads out of it."""
    path = root / relative
    if not relative:
        raise DataError("no path")
    if Path(relative).is_absolute() or ".." in Path(relative).parts:
        raise DataError(f"path outside {root}: {relative}")
    try:
        if not path.is_file():
            raise DataError(f"no such file: {path}")
        if not path.resolve().is_relative_to(root):
            raise DataError(f"path outside {root}: {relative} is a link to {path.resolve()}")
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return path


def check_table(name: object, table: pd.DataFrame, problems: list[str]) -> None:
    """Check a Source's table and add its bad rows to `problems`; a DataError when there is nothing to check."""
    if table.empty and not problems:
        raise DataError(f"{name}: no images")
    if table.empty:
        return
    one_line = pa.Check(lambda text: text.str.fullmatch(r"[^\r\n\0]+"), error="empty, or has a line break")
    schema = pa.DataFrameSchema(
        {
            "image_id": pa.Column(str, one_line, unique=True, report_duplicates="exclude_first"),
            "path": pa.Column(str, pa.Check(lambda text: ~text.str.contains(r"[\r\n\0]"), error="has a line break")),
            "class_name": pa.Column(str, one_line),
            "group": pa.Column(str),
            "where": pa.Column(str),
        },
        index=pa.Index(int, unique=True),
        strict=True,
    )
    try:
        schema.validate(table, lazy=True)
    except pa.errors.SchemaErrors as error:
        for case in error.failure_cases.itertuples():
            rule = {"field_uniqueness": "stands twice"}.get(str(case.check), str(case.check))
            where = table["where"].get(case.index)
            problems.append(f"{where + ': ' if where else ''}{case.column} {case.failure_case!r}: {rule}")


def read_frame(path: Path, needed: Iterable[str]) -> pd.DataFrame:
    """A CSV that an earlier stage wrote, as text (a class may be called NA), except for whole-number columns."""
    try:
        if not path.read_bytes().endswith(b"\n"):
            raise DataError(f"{path}: cut: its last line has no end")
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from error
    missing = [name for name in needed if name not in frame]
    if missing:
        raise DataError(f"{path}: missing column {', '.join(missing)}")
    whole = ("label", "position", "true_label", "noisy_label", "is_flipped", "is_error", "has_cue", "in_meta_set")
    try:
        return frame.astype({name: "int64" for name in whole if name in frame})
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def read_facts(path: Path, **kinds: type) -> dict[str, Any]:
    """A JSON object that an earlier stage wrote; a DataError when it has not these keys, with values of these kinds."""
    facts = io.read_json(path)
    if not isinstance(facts, dict):
        raise DataError(f"{path}: need an object with the keys {', '.join(kinds)}, got a {type(facts).__name__}")
    wrong = [name for name, kind in kinds.items() if not isinstance(facts.get(name), kind)]
    refuse(path, [f"{name}: need {kinds[name].__name__}, got {type(facts.get(name)).__name__}" for name in wrong])
    return facts


def read_split(
    split: Path, summary: Path, needed: Iterable[str], n_images: int | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """The rows of a split and its classes, after a check that the two files belong together and are whole.

    Parameters
    ----------
    needed : columns beside `image_id`, `label` and `side`.
    n_images : images in the pack, where the rows' positions in it are needed.
    """
    table, facts = read_frame(split, ("image_id", "label", "side", *needed)), read_facts(summary, classes=list)
    found = table["side"].value_counts().to_dict()
    for side, about in facts.get("sides", {}).items():
        if found.get(side, 0) != about["n"]:
            raise DataError(f"{split}: {found.get(side, 0)} rows on the side {side}, but {summary} counts {about['n']}")
    limits = {"label": len(facts["classes"])} | ({} if n_images is None else {"position": n_images})
    wrong = {"stands twice": table["image_id"].duplicated()}
    wrong |= {f"{name} is not in 0..{limit - 1}": ~table[name].between(0, limit - 1) for name, limit in limits.items()}
    problems = [f"image {image}: {rule}" for rule, rows in wrong.items() for image in table["image_id"][rows]]
    refuse(split, problems)
    return table, facts["classes"]


def short_digests(sha256: Iterable[str]) -> np.ndarray:
    """The first 64 bits of digests in hexadecimal, (n,) int64, as model files list the images they have seen."""
    return np.array([int(text[:16], 16) for text in sha256], dtype=np.uint64).view(np.int64)
