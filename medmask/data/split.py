"""Which image goes to which side: drawn by group and class, or by the source's own lists. Pure functions."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from medmask.config.data import MetaSet, Split
from medmask.data.groups import assign_groups, find_groups
from medmask.data.shortcut import place_cues
from medmask.errors import DataError, lookup

SIDES = ("train", "val", "test", "meta_set")
COLUMNS = ("image_id", "position", "label", "class_name", "group", "sha256", "side", "test_set")


def make_split(manifest: pd.DataFrame, dataset: Mapping[str, Any], cfg: Split) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Put images on sides.

    Parameters
    ----------
    manifest : image_id, label, class_name, group, split_hint, sha256; one row an image, in pack order.
    dataset : `classes`, `lists` (name: n) and `orders` (name: positions, where a list has an order of its own); with
        `shortcut`, its settings, the test sets are those of the cue and the column `has_cue` is there.

    Returns
    -------
    DataFrame with COLUMNS, one row an image that is on a side.
    dict : classes, sides, test_sets, crossing, notes; what split.json holds.
    """
    table = manifest.assign(
        position=np.arange(len(manifest)), group=find_groups(manifest), side="", test_set=""
    ).reset_index(drop=True)
    both = np.zeros(len(table), dtype=bool)
    if cfg.sizes is not None:
        table["side"] = draw_sides(table, count_sizes(cfg.sizes, len(table)), cfg)
    else:
        both = place_lists(table, dataset["lists"], cfg)
    table.loc[table["side"] == "test", "test_set"] = table["test_set"].where(table["test_set"] != "", "test")
    # a list is as it is, but a split that is drawn here need not cross
    rule = "refuse" if cfg.sizes is not None and cfg.crossing == "drop" else cfg.crossing
    crossing, notes = handle_crossing(table, both, rule)
    if cfg.sizes is None and isinstance(cfg.val, float | int) and cfg.val > 0:
        draw_validation(table, cfg)
    if cfg.meta_set is not None:
        notes += take_meta_set(table, cfg.meta_set, dataset["lists"], cfg)
    if cfg.sizes is not None:
        notes += unmet_counts(table, cfg.sizes)
    if cfg.kind == "folders" and (unused := int(((table["side"] == "") & ~both).sum()) - crossing["dropped"]) > 0:
        notes.append(f"{unused} images of the source are on no side: `train`, `val` and `test` name no list with them.")
    if empty := {"train", "test"} - set(table["side"]):
        raise DataError(
            f"split: no image is left for {' and '.join(sorted(empty))}{': ' if notes else ''}{' '.join(notes)}"
        )
    rows = list_order(table, dataset.get("orders", {}).get(cfg.train) if cfg.sizes is None else None)
    if "shortcut" in dataset:
        rows = place_cues(rows, dataset["shortcut"], dataset["n"])
    if cfg.meta_set is not None and cfg.meta_set.missing_class == "refuse":
        absent = [note for note in missing_classes(rows, table, dataset["classes"]) if note.endswith("side meta_set.")]
        if absent:
            raise DataError(f"split.meta_set.missing_class: refuse: {absent[0]}")
    summary: dict[str, Any] = {
        "classes": list(dataset["classes"]),
        "sides": {side: describe(rows[rows["side"] == side], dataset["classes"]) for side in SIDES},
        "test_sets": {
            name: describe(rows[rows["test_set"] == name], dataset["classes"])
            for name in sorted(set(rows["test_set"]) - {""})
        },
        "crossing": crossing,
        "notes": notes + missing_classes(rows, table, dataset["classes"]),
    }
    if "in_meta_set" in rows:
        summary["shared_meta_set"] = rows["side"][rows["in_meta_set"] == 1].value_counts().to_dict()
    return rows, summary


def count_sizes(sizes: Mapping[Any, float], n: int) -> dict[str, int]:
    """Images wanted on each side; fractions are rounded so that they sum to what they sum to of `n`."""
    if all(isinstance(size, int) for size in sizes.values()):
        wanted = {side: int(size) for side, size in sizes.items()}
    else:
        ends = np.rint(np.cumsum(list(sizes.values())) * n).astype(int)
        wanted = dict(zip(sizes, map(int, np.diff(ends, prepend=0)), strict=True))
    if sum(wanted.values()) > n:
        raise DataError(f"split.sizes: need {sum(wanted.values())} images for {wanted}, the dataset has {n}")
    return {side: size for side, size in wanted.items() if size > 0}


def draw_sides(table: pd.DataFrame, wanted: Mapping[str, int], cfg: Split) -> np.ndarray:
    """Side of each row ("" for the images left over), drawn by class from whole groups or from single images."""
    units = table["group"].factorize()[0] if cfg.by == "group" else np.arange(len(table))
    counts = np.zeros((units.max(initial=-1) + 1, table["label"].max() + 1), dtype=np.int64)
    np.add.at(counts, (units, table["label"]), 1)
    rng = np.random.default_rng([cfg.seed, *b"split"])
    sides = assign_groups(counts, np.array(list(wanted.values())), rng)
    return np.array([*wanted, ""])[sides[units]]


def place_lists(table: pd.DataFrame, lists: Mapping[str, int], cfg: Split) -> np.ndarray:
    """Fill `side` and `test_set` from the source's lists; returns which images stand in a test list and in another."""
    hints = table["split_hint"].str.split(";")

    def members(name: str, key: str) -> np.ndarray:
        lookup(lists, name, f"split.{key}")
        return np.array([name in names for names in hints])

    tests = {"test": cfg.test} if isinstance(cfg.test, str) else cfg.test
    for test_set, name in tests.items():
        rows = members(name, "test")
        if (twice := rows & (table["side"] == "test")).any():
            raise DataError(f"split.test: images in two test sets: {few(table['image_id'][twice])}")
        table.loc[rows, ["side", "test_set"]] = "test", test_set
    in_test, train = np.array(table["side"] == "test"), members(cfg.train, "train")
    val = members(cfg.val, "val") if isinstance(cfg.val, str) else np.zeros_like(train)
    if (train & val).any():
        raise DataError(f"split: images in both {cfg.train} and {cfg.val}: {few(table['image_id'][train & val])}")
    both = in_test & (train | val)
    if both.any() and cfg.crossing == "keep":
        raise DataError(
            f"split: images in a test list and in {cfg.train} or {cfg.val}: {few(table['image_id'][both])}; "
            "an image has one side: use `crossing: drop`, which keeps them for the test"
        )
    table.loc[train & ~in_test, "side"] = "train"
    table.loc[val & ~in_test, "side"] = "val"
    return both


def handle_crossing(table: pd.DataFrame, both: np.ndarray, rule: str) -> tuple[dict[str, Any], list[str]]:
    """Treat training and validation images whose group is in a test set too.

    Parameters
    ----------
    table : `side` is emptied for the images that are dropped.
    both : (N,), images that the source lists for training and for test; they are test images by now.
    rule : drop, refuse or keep.

    Returns
    -------
    dict : groups, images (training and validation images concerned), kept, dropped; and sentences for the footnote.
    """
    test = table["side"] == "test"
    fitted = table["side"].isin(["train", "val"])
    crossing = fitted & table["group"].isin(set(table["group"][test]))
    groups = set(table["group"][crossing | both])
    n_images = int(crossing.sum() + both.sum())
    result = {"groups": len(groups), "images": n_images, "kept": rule == "keep" and n_images > 0, "dropped": 0}
    if n_images == 0:
        return result, []
    n_test = int((test & table["group"].isin(groups)).sum())
    fact = (
        f"{n_images} training or validation images show {len(groups)} groups (patients, lesions) of the test set "
        f"({n_test} of {int(test.sum())} test images)"
    )
    if rule == "refuse":
        raise DataError(
            f"split.crossing: {fact}: {few(table['image_id'][crossing | both])}; draw `by: group`, or set `crossing`"
        )
    if rule == "drop":
        table.loc[crossing, "side"] = ""
        result["dropped"] = n_images
    return result, [f"{fact}: {'kept, as published' if rule == 'keep' else 'dropped from training and validation'}."]


def draw_validation(table: pd.DataFrame, cfg: Split) -> None:
    """Move a fraction of the training images to the validation side."""
    train = table[table["side"] == "train"]
    val = count_sizes({"val": float(cfg.val)}, len(train))
    table.loc[train.index, "side"] = draw_sides(train, {"train": len(train) - sum(val.values()), **val}, cfg)


def take_meta_set(table: pd.DataFrame, wish: MetaSet, lists: Mapping[str, int], cfg: Split) -> list[str]:
    """Fill the side `meta_set` from images on no side whose groups are on none; returns sentences for the footnote."""
    used = table["group"].isin(set(table["group"][table["side"] != ""]))
    if wish.list is None:
        table.loc[draw_meta_set(table, ~used, wish, cfg.seed), "side"] = "meta_set"
        return []
    lookup(lists, wish.list, "split.meta_set.list")
    listed = table["split_hint"].str.split(";").map(lambda names: wish.list in names)
    if not listed.any():
        raise DataError(f"split.meta_set: need images in list {wish.list}, and none of its images is in this dataset")
    taken = listed & (table["side"] != "")
    crossing = listed & used & ~taken
    if cfg.crossing == "refuse" and (taken | crossing).any():
        ids = few(table["image_id"][taken | crossing])
        raise DataError(f"split.meta_set: images, or their groups, on another side: {ids}; see `crossing`")
    if cfg.crossing == "keep":
        return share_meta_set(table, listed, crossing)
    left_out = taken | crossing
    if not (listed & ~left_out).any():
        raise DataError(
            f"split.meta_set: no image of list {wish.list} is free; {int(left_out.sum())} are on other sides"
        )
    table.loc[listed & ~left_out, "side"] = "meta_set"
    count = int(left_out.sum())
    text = f"{count} images of {wish.list} are not in the meta set: they, or their groups, are on another side."
    return [text] if count else []


def share_meta_set(table: pd.DataFrame, listed: pd.Series, crossing: pd.Series) -> list[str]:
    """Trust all listed images, those of other sides too, which the column `in_meta_set` marks; sentences on that."""
    shared = listed & (table["side"] != "")
    if shared.any():
        table["in_meta_set"] = shared.astype(int)
    table.loc[listed & ~shared, "side"] = "meta_set"
    counts = table["side"][shared].value_counts()
    parts = [f"{counts[side]} on the side {side}" for side in SIDES if side in counts]
    notes = [f"Of {int(listed.sum())} images of the meta set {' and '.join(parts)} too: kept, as published."]
    lesions = f"{int(crossing.sum())} more images of the meta set show groups of another side: kept, as published."
    return notes * bool(parts) + [lesions] * bool(crossing.any())


def draw_meta_set(table: pd.DataFrame, is_free: pd.Series, wish: MetaSet, seed: int) -> pd.Index:
    """Free rows, drawn: so many in all, or of each class; `draw` ends `per_class` early, with the classes in turn."""
    rng = np.random.default_rng([seed, *b"meta_set"])
    free = table[is_free]
    free = free.iloc[rng.permutation(len(free))]
    if wish.counts is not None:
        for name in wish.counts:
            lookup(dict.fromkeys(table["class_name"]), name, "split.meta_set.counts")
        left = free["class_name"].value_counts()
        short = [f"{name}: {left.get(name, 0)} of {n}" for name, n in wish.counts.items() if left.get(name, 0) < n]
        if short:
            raise DataError(f"split.meta_set.counts: too few images are free of {', '.join(short)}")
        return free.index[free.groupby("class_name").cumcount() < free["class_name"].map(wish.counts).fillna(0)]
    if wish.per_class is not None:
        rank = free.groupby("label").cumcount()
        free = free.loc[rank[rank < wish.per_class].sort_values(kind="stable").index]
        left = free["class_name"].value_counts().reindex(table["class_name"].unique(), fill_value=0)
        short = [f"{name}: {n}" for name, n in left.items() if n < wish.per_class]
        if short and wish.draw is None:
            raise DataError(f"split.meta_set: need {wish.per_class} images a class, but free are {', '.join(short)}")
    wanted = len(free) if wish.draw is None else wish.draw
    if wanted > len(free):
        raise DataError(
            f"split.meta_set: need {wanted} images, but {len(free)} are free (on no side, nor their groups)"
        )
    return free.index[:wanted]


def list_order(table: pd.DataFrame, order: Iterable[int] | None) -> pd.DataFrame:
    """The rows on a side: training rows first, in the order of their list, where there is one; else by position."""
    rows = table[table["side"] != ""]
    if order is not None:
        place = {position: number for number, position in enumerate(order)}
        key = rows["position"].map(place).where(rows["side"] == "train", len(place))
        rows = rows.iloc[np.argsort(key, kind="stable")]
    return rows[[*COLUMNS, *(["in_meta_set"] if "in_meta_set" in rows else [])]].reset_index(drop=True)


def describe(rows: pd.DataFrame, classes: Iterable[str]) -> dict[str, Any]:
    """Images, groups and images of each class."""
    counts = rows["class_name"].value_counts().to_dict()
    return {
        "n": len(rows),
        "groups": rows["group"].nunique(),
        "classes": {name: counts.get(name, 0) for name in classes},
    }


def missing_classes(rows: pd.DataFrame, table: pd.DataFrame, classes: Iterable[str]) -> list[str]:
    """Sentences on classes that have images, but none on a side."""
    notes = []
    for side in SIDES:
        is_here = rows["side"] == side
        if side == "meta_set" and "in_meta_set" in rows:
            is_here |= rows["in_meta_set"] == 1
        here = set(rows["class_name"][is_here])
        absent = [name for name in classes if name not in here and name in set(table["class_name"])]
        if here and absent:
            notes.append(f"No image of {', '.join(absent)} on the side {side}.")
    return notes


def unmet_counts(table: pd.DataFrame, sizes: Mapping[Any, float]) -> list[str]:
    """Sentences on sides that are not of the size asked for, where numbers of images were asked for."""
    found = {side: int((table["side"] == side).sum()) for side, size in sizes.items() if isinstance(size, int)}
    return [
        f"{n} images on the side {side} for the {sizes[side]} asked for: groups stay whole or were dropped."
        for side, n in found.items()
        if n != sizes[side]
    ]


def few(images: pd.Series) -> str:
    """The first image ids for an error, and how many there are."""
    return ", ".join(images.head(20)) + (f" and {len(images) - 20} more" if len(images) > 20 else "")
