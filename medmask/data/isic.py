"""Reader of ISIC 2019: official one-hot tables, and the lists of a published label-noise study.

Source: github.com/Cute77/learning-to-reweight-examples (list formats `IMAGE,one-hot`, `mark IMAGE,one-hot` and
`mark given IMAGE,one-hot`). Differs: of the lists only the images and their order count, never the labels.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from medmask.config.data import Dataset
from medmask.data.pack import SUFFIXES, load_image
from medmask.data.tables import Source, check_table, inside, read_lists, read_rows, read_table, refuse
from medmask.errors import DataError

log = logging.getLogger(__name__)

CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
LABELS = "ISIC_2019_Training_GroundTruth.csv"
METADATA = "ISIC_2019_Training_Metadata.csv"
IMAGES = "ISIC_2019_Training_Input"


@dataclass(frozen=True)
class ListRow:
    """One row of a list; `mark` 1 says that the label was flipped, `given` is then the true class."""

    image: str
    label: int
    mark: int | None = None
    given: int | None = None


def parse_row(fields: Sequence[str]) -> ListRow:
    """Read `[mark [given]] IMAGE,one-hot`; a ValueError says what is wrong."""
    match = re.fullmatch(r"(?:([01]) )?(?:(\d) )?(\S+)", fields[0])
    if match is None or (match[2] is not None and match[1] is None):
        raise ValueError(f"need IMAGE, `mark IMAGE` or `mark given IMAGE`, got {fields[0]!r}")
    mark, given = (None if text is None else int(text) for text in match.group(1, 2))
    return ListRow(match[3], one_hot(fields[1:]), mark, given)


def one_hot(fields: Sequence[str]) -> int:
    """Position of the single 1 among 8 or 9 fields; a ValueError says what is wrong."""
    if len(fields) not in (8, 9):
        raise ValueError(f"need an image and 8 or 9 one-hot columns, got {len(fields) + 1} columns")
    values = [float(field) if re.fullmatch(r"[01](\.0*)?", field) else None for field in fields]
    if None in values:
        raise ValueError(f"need 0.0 or 1.0 in each one-hot column, got {', '.join(fields)}")
    if values.count(1.0) != 1:
        raise ValueError(f"need a single 1 among the one-hot columns, got {values.count(1.0)}")
    return values.index(1.0)


def plain(image: str) -> str:
    """Name of an image without the `_downsampled` that some of its copies carry."""
    return image.removesuffix("_downsampled")


def read_ground_truth(path: Path, problems: list[str] | None = None) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Table `image_id, class_name, where` and the classes; the header, where there is one, names the classes."""
    wrong: list[str] = []
    rows = read_rows(path, wrong)
    classes = CLASSES[: len(rows[0][1]) - 1]
    if rows[0][1][0].lower() == "image":
        classes = tuple(rows.pop(0)[1][1:])
        if len(classes) not in (8, 9) or not set(classes) <= set(CLASSES) or len(set(classes)) < len(classes):
            raise DataError(f"{path}:1: need the columns image,{','.join(CLASSES)}, got image,{','.join(classes)}")
    found = []
    for line, fields in rows:
        name = CLASSES[0]  # where there is none, so that image and id of the row are looked at all the same
        try:
            if len(fields) != len(classes) + 1:
                raise ValueError(f"need {len(classes) + 1} columns, got {len(fields)}")
            name = classes[one_hot(fields[1:])]
        except ValueError as error:
            wrong.append(f"{path}:{line}: {error}")
        found.append((fields[0], name, f"{path}:{line}"))
    refuse(path, wrong, problems)
    return pd.DataFrame(found, columns=["image_id", "class_name", "where"], dtype=str), classes


def read_lesions(path: Path, problems: list[str] | None = None) -> dict[str, str]:
    """Plain image name -> lesion, "" where unknown."""
    wrong: list[str] = []
    table = read_table(path, ("image", "lesion_id"), wrong)
    names = table["image"].map(plain)
    wrong += [f"{path}:{line}: image {names[line]!r} stands twice" for line in names.index[names.duplicated()]]
    refuse(path, wrong, problems)
    return dict(zip(names, table["lesion_id"], strict=True))


def list_known(image_ids: Sequence[str]) -> dict[str, str]:
    """Plain name -> image id, to look up the images of lists."""
    return {plain(image): image for image in image_ids}


def read_isic_lists(
    files: dict[str, Path], image_ids: Sequence[str], problems: list[str] | None = None
) -> dict[str, list[str]]:
    """The published lists, each as image ids in its order."""
    return read_lists(files, list_known(image_ids), lambda fields: plain(parse_row(fields).image), problems)


def read_isic2019(root: Path, cfg: Dataset) -> Source:
    """ISIC 2019; the images of one lesion are one group."""
    problems: list[str] = []
    labels = inside(root, cfg.labels or LABELS)
    table, classes = read_ground_truth(labels, problems)
    images = root / (cfg.images or IMAGES)
    if not images.is_dir():
        raise DataError(f"{images}: no such image folder")
    if cfg.metadata is None and not (root / METADATA).exists():
        log.warning("%s: no such table, so which images show one lesion is unknown", root / METADATA)
        table["group"] = ""
    else:
        lesions = read_lesions(inside(root, cfg.metadata or METADATA), problems)
        table["group"] = [lesions.get(plain(image), "") for image in table["image_id"]]
    names = {path.stem: path.name for path in images.iterdir() if path.suffix.lower() in SUFFIXES}
    by_plain = {plain(stem): name for stem, name in names.items()}
    files = [names.get(image) or by_plain.get(plain(image), f"{image}.jpg") for image in table["image_id"]]
    paths = [(images / name).relative_to(root).as_posix() for name in files]
    table["path"] = paths
    check_table(labels, table, problems)
    lists = {name: inside(root, file) for name, file in cfg.lists.items()}
    found = read_isic_lists(lists, list(table["image_id"]), problems)
    return Source(table, classes, lambda row: load_image(root, paths[row]), found, problems=problems)
