"""Tables on disk, and the one frame that every reader returns, checked row by row."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pandera.pandas as pa
from PIL import Image

from medmask.errors import DataError, listing

Row = tuple[int, list[str]]  # line number in the file, fields


@dataclass(frozen=True)
class Source:
    """What a reader found, before anything is decoded.

    Attributes
    ----------
    table : DataFrame with the text columns `image_id`, `path` (relative to the dataset's folder, `file#index` inside a
        file), `class_name`, `group` ("" for none) and `where` (for errors); its index holds what `load` takes.
    classes : class names in label order, also those without images.
    load : index value -> the image, as PIL image or uint8 array (H, W).
    lists : name -> image ids in the list's order.
    closed : the source itself says which classes there are; otherwise any text in the table is a class.
    """

    table: pd.DataFrame
    classes: tuple[str, ...]
    load: Callable[[int], Image.Image | np.ndarray]
    lists: dict[str, list[str]]
    closed: bool = True


def refuse(name: object, problems: list[str]) -> None:
    """Raise a DataError with all problems of `name`, one a line; return when there are none."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DataError(f"{name}: {count}:\n  {listing(problems)}")


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file as text; CRLF or LF; a DataError lists every empty line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot read the table: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, [field.strip() for field in fields]) for fields in reader]
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error
    refuse(path, [f"line {line}: empty line" for line, fields in rows if not any(fields)])
    if not rows:
        raise DataError(f"{path}: the table is empty")
    return rows


def read_table(path: Path, needed: Iterable[str]) -> pd.DataFrame:
    """A CSV file with a header as text; the index holds line numbers. DataError for columns missing or uneven."""
    (_, header), *rows = read_rows(path)
    missing = [name for name in needed if name not in header]
    if missing or len(set(header)) < len(header):
        wrong = f"missing column {', '.join(missing)}" if missing else "a column name stands twice"
        raise DataError(f"{path}:1: {wrong}; the columns are {', '.join(header)}")
    uneven = [(line, len(fields)) for line, fields in rows if len(fields) != len(header)]
    refuse(path, [f"line {line}: need {len(header)} columns, got {count}" for line, count in uneven])
    return pd.DataFrame([fields for _, fields in rows], index=[line for line, _ in rows], columns=header, dtype=str)


def read_lists(
    files: Mapping[str, Path], known: Mapping[str, str], parse: Callable[[list[str]], str] = lambda fields: fields[0]
) -> dict[str, list[str]]:
    """Image ids of list files, in the files' order.

    Parameters
    ----------
    files : name -> file, one image a row.
    known : a list's name of an image -> its image id; any other name is refused.
    parse : fields of a row -> the list's name of the image; a ValueError says what is wrong with the row.
    """
    lists, problems = {}, []
    for name, path in files.items():
        seen: dict[str, int] = {}
        for line, fields in read_rows(path):
            try:
                image = known.get(parsed := parse(fields))
            except ValueError as error:
                problems.append(f"{path}:{line}: {error}")
                continue
            if image is None:
                problems.append(f"{path}:{line}: image {parsed!r} is not in the dataset")
            elif image in seen:
                problems.append(f"{path}:{line}: image {parsed!r} again (first in line {seen[image]})")
            else:
                seen[image] = line
        lists[name] = list(seen)
    refuse("lists", problems)
    return lists


def path_problem(root: Path, relative: str) -> str | None:
    """Why `relative` is no file inside the resolved folder `root`; None when it is one."""
    if not relative:
        return "no path"
    if Path(relative).is_absolute() or ".." in Path(relative).parts:
        return f"path outside {root}: {relative}"
    try:
        if not (root / relative).is_file():
            return f"no such file: {relative}"
        if not (root / relative).resolve().is_relative_to(root):
            return f"path outside {root}: {relative} is a link to {(root / relative).resolve()}"
    except (OSError, RuntimeError) as error:
        return f"cannot read {relative}: {error}"
    return None


def check_table(name: object, table: pd.DataFrame, problems: list[str]) -> None:
    """Check a Source's table; a DataError lists its bad rows together with the `problems` found before."""
    one_line = pa.Check(lambda text: text.str.fullmatch(r"[^\r\n\0]+"), error="empty, or has a line break")
    schema = pa.DataFrameSchema(
        {
            "image_id": pa.Column(str, one_line, unique=True, report_duplicates="exclude_first"),
            "path": pa.Column(str, one_line),
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
            where = f"{table['where'][case.index]}: " if case.index in table.index else ""
            problems = [*problems, f"{where}{case.column} {case.failure_case!r}: {rule}"]
    refuse(name, problems)
    if table.empty:
        raise DataError(f"{name}: no images")


def read_frame(path: Path, needed: Iterable[str]) -> pd.DataFrame:
    """A CSV that an earlier stage wrote, as text (a class may be called NA), except for whole-number columns."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from error
    missing = [name for name in needed if name not in frame]
    if missing:
        raise DataError(f"{path}: missing column {', '.join(missing)}")
    numbers = [name for name in ("label", "position", "true_label", "noisy_label", "is_flipped") if name in frame]
    try:
        return frame.astype(dict.fromkeys(numbers, "int64"))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
