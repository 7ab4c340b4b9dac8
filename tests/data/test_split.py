"""Splits: groups stay whole, classes are shared out, lists are followed, crossings are counted."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmask.config.data import Split
from medmask.data.groups import assign_groups, find_groups
from medmask.data.split import count_sizes, make_split
from medmask.errors import ConfigError, DataError

CLASSES = ["a", "b", "c"]


def make_manifest(labels, groups=None, hints=None, pixels=None):
    n = len(labels)
    ids = [f"i{number}" for number in range(n)]
    return pd.DataFrame(
        {
            "image_id": ids,
            "label": labels,
            "class_name": [CLASSES[label] for label in labels],
            "group": groups or [""] * n,
            "split_hint": hints or [""] * n,
            "sha256": pixels or ids,
        }
    )


def split(manifest, orders=None, also=(), **keys):
    names = {name for hint in manifest["split_hint"] for name in hint.split(";")} - {""} | {*also}
    dataset = {"classes": CLASSES, "lists": dict.fromkeys(names, 1), "orders": orders or {}}
    return make_split(manifest, dataset, Split(**keys))


def sides(rows):
    return dict(zip(rows["image_id"], rows["side"], strict=True))


# groups


def test_groups_join_by_name_and_by_pixels():
    manifest = make_manifest([0] * 7, ["p", "", "q", "", "", "r", "p"], pixels=list("vwwxxyz"))
    # i1 has the pixels of i2, of patient q; i3 and i4 have no patient and the same pixels
    assert find_groups(manifest) == ["p", "q", "q", "image:i3", "image:i3", "r", "p"]


def test_patients_with_an_identical_image_are_one_group():
    assert find_groups(make_manifest([0] * 4, ["q", "q", "p", "s"], pixels=["1", "2", "2", "3"])) == [
        "p",
        "p",
        "p",
        "s",
    ]


# sizes


def test_fractions_become_counts():
    assert count_sizes({"train": 0.7, "val": 0.15, "test": 0.15}, 1797) == {"train": 1258, "val": 269, "test": 270}
    assert count_sizes({"train": 0.5, "test": 0.25}, 10) == {"train": 5, "test": 3}  # 7.5 images end at 8
    assert count_sizes({"train": 3, "val": 0, "test": 2}, 6) == {"train": 3, "test": 2}
    with pytest.raises(DataError, match=r"need 7 images for .*, the dataset has 6"):
        count_sizes({"train": 4, "test": 3}, 6)


@st.composite
def groups_and_goals(draw):
    """Groups of one class each, and sizes that use all images or leave some over."""
    sizes = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), min_size=6, max_size=60))
    counts = np.zeros((len(sizes), 5), dtype=int)
    for group, (label, size) in enumerate(sizes):
        counts[group, label] = size
    parts = draw(st.lists(st.integers(2, 6), min_size=2, max_size=4))
    goals = np.array(parts) * counts.sum() // sum(parts)
    if draw(st.booleans()):
        goals[0] += counts.sum() - goals.sum()
    return counts, goals, draw(st.integers(0, 2**32))


@given(groups_and_goals())
@settings(max_examples=200, deadline=None)
def test_assigned_groups(case):
    counts, goals, seed = case
    side = assign_groups(counts, goals, np.random.default_rng(seed))
    assert ((side >= 0) & (side <= len(goals))).all()  # one side a group
    placed = np.array([counts[side == number].sum() for number in range(len(goals) + 1)])
    largest = counts.sum(axis=1).max()
    wished = np.append(goals, counts.sum() - goals.sum())
    assert (placed - wished < largest).all()
    assert (wished - placed < largest * len(goals)).all()
    if (goals >= 5 * largest).all():  # room for each class
        for label in np.flatnonzero((counts > 0).sum(axis=0) >= len(goals)):
            assert all(counts[side == number, label].any() for number in range(len(goals)))
    assert (side == assign_groups(counts, goals, np.random.default_rng(seed))).all()


@given(st.lists(st.integers(0, 2), min_size=12, max_size=80), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_single_images_meet_sizes_and_shares(labels, seed):
    counts = np.eye(3, dtype=int)[labels]
    n = len(labels)
    goals = np.array([n // 2, n // 4])
    side = assign_groups(counts, goals, np.random.default_rng(seed))
    assert [(side == number).sum() for number in range(2)] == goals.tolist()
    for number, goal in enumerate(goals):
        share = counts.sum(axis=0) * goal / n
        assert (np.abs(counts[side == number].sum(axis=0) - share) <= 2).all()


def test_large_groups_go_to_all_sides():
    counts = np.array([[4]] * 40 + [[1]] * 40)  # half of the groups, 160 of 200 images
    side = assign_groups(counts, np.array([100, 100]), np.random.default_rng(0))
    assert abs((side[:40] == 0).sum() - 20) <= 1


def test_largest_group_first():
    counts = np.array([[1]] * 6 + [[6]] * 3)
    side = assign_groups(counts, np.array([13, 11]), np.random.default_rng(0))
    assert [counts[side == number].sum() for number in range(2)] == [13, 11]


def test_a_rare_class_is_on_every_side():
    counts = np.array([[1, 0]] * 97 + [[0, 1]] * 3)
    side = assign_groups(counts, np.array([70, 15, 15]), np.random.default_rng(0))
    assert sorted(side[-3:]) == [0, 1, 2]
    assert [(side == number).sum() for number in range(3)] == [70, 15, 15]


# stratified


def test_stratified_by_group():
    rng = np.random.default_rng(0)
    patient = rng.integers(0, 100, 300)
    manifest = make_manifest((patient % 3).tolist(), [f"p{number}" for number in patient])
    rows, summary = split(manifest, kind="stratified", sizes={"train": 0.6, "val": 0.2, "test": 0.2}, seed=3)
    assert len(rows) == 300
    assert rows.groupby("group")["side"].nunique().max() == 1
    assert rows["position"].tolist() == list(range(300))
    assert summary["crossing"] == {"groups": 0, "images": 0, "kept": False, "dropped": 0}
    for side, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        about = summary["sides"][side]
        assert abs(about["n"] - 300 * share) <= 6
        for name, n in manifest["class_name"].value_counts().items():
            assert abs(about["classes"][name] - n * share) <= 6
    assert set(rows["test_set"][rows["side"] == "test"]) == {"test"}
    assert set(rows["test_set"][rows["side"] != "test"]) == {""}
    again, _ = split(manifest, kind="stratified", sizes={"train": 0.6, "val": 0.2, "test": 0.2}, seed=3)
    other, _ = split(manifest, kind="stratified", sizes={"train": 0.6, "val": 0.2, "test": 0.2}, seed=4)
    assert sides(rows) == sides(again)
    assert sides(rows) != sides(other)


def test_stratified_by_image_with_counts_and_crossing():
    manifest = make_manifest([0, 1] * 20, [f"p{number // 4}" for number in range(40)])
    keys = {"kind": "stratified", "sizes": {"train": 20, "test": 10}, "by": "image"}
    rows, summary = split(manifest, **keys, crossing="keep")
    assert rows["side"].value_counts().to_dict() == {"train": 20, "test": 10}
    crossing = summary["crossing"]
    shared = set(rows["group"][rows["side"] == "test"]) & set(rows["group"][rows["side"] == "train"])
    assert crossing["kept"]
    assert crossing["dropped"] == 0
    assert crossing["groups"] == len(shared) > 0
    assert crossing["images"] == (rows["group"].isin(shared) & (rows["side"] == "train")).sum()
    for rule in ("drop", "refuse"):
        with pytest.raises(DataError, match="training or validation images show"):
            split(manifest, **keys, crossing=rule)


def test_identical_pixels_stay_together():
    manifest = make_manifest([0] * 20, pixels=[str(number // 2) for number in range(20)])
    rows, _ = split(manifest, kind="stratified", sizes={"train": 0.5, "test": 0.5})
    assert rows.groupby("sha256")["side"].nunique().max() == 1


def test_missing_class_is_said():
    _, summary = split(make_manifest([0, 0, 0, 0, 1]), kind="stratified", sizes={"train": 0.6, "test": 0.4})
    assert any(
        note in summary["notes"] for note in ("No image of b on the side test.", "No image of b on the side train.")
    )
    assert not any(" c " in note for note in summary["notes"])  # nowhere in the data
    assert summary["sides"]["train"]["classes"]["c"] == 0


def test_split_larger_than_the_data():
    with pytest.raises(DataError, match="need 6 images"):
        split(make_manifest([0] * 5), kind="stratified", sizes={"train": 4, "test": 2})


# lists


LISTED = ["train", "train", "train", "train", "test", "test", "", "", ""]


def test_lists_in_their_order():
    manifest = make_manifest([0, 1, 0, 1, 0, 1, 2, 2, 2], hints=LISTED)
    rows, summary = split(manifest, {"train": [3, 0, 2, 1]}, kind="lists")
    assert rows["image_id"].tolist() == ["i3", "i0", "i2", "i1", "i4", "i5"]
    assert rows["position"].tolist() == [3, 0, 2, 1, 4, 5]
    assert summary["sides"]["train"] == {"n": 4, "groups": 4, "classes": {"a": 2, "b": 2, "c": 0}}
    assert summary["test_sets"] == {"test": {"n": 2, "groups": 2, "classes": {"a": 1, "b": 1, "c": 0}}}
    assert "No image of c on the side train." in summary["notes"]


def test_lists_crossing():
    groups = ["p", "q", "q", "r", "p", "s", "", "", ""]
    manifest = make_manifest([0] * 9, groups, LISTED)
    rows, summary = split(manifest, kind="lists")
    assert "i0" not in sides(rows)
    assert summary["crossing"] == {"groups": 1, "images": 1, "kept": False, "dropped": 1}
    assert "(1 of 2 test images): dropped" in summary["notes"][0]
    rows, summary = split(manifest, kind="lists", mode="as_published")
    assert sides(rows)["i0"] == "train"
    assert summary["crossing"] == {"groups": 1, "images": 1, "kept": True, "dropped": 0}
    with pytest.raises(DataError, match=r"1 groups .*: i0"):
        split(manifest, kind="lists", crossing="refuse")


def test_identical_pixels_cross_lists():
    manifest = make_manifest([0] * 9, hints=LISTED, pixels=list("abcdaefgh"))
    rows, summary = split(manifest, kind="lists")
    assert "i0" not in sides(rows)
    assert summary["crossing"]["dropped"] == 1


def test_an_image_in_a_test_list_and_in_training():
    manifest = make_manifest([0] * 9, hints=["train;test", *LISTED[1:]])
    rows, summary = split(manifest, kind="lists")
    assert sides(rows)["i0"] == "test"
    assert summary["crossing"] == {"groups": 1, "images": 1, "kept": False, "dropped": 1}
    for rule in ("keep", "refuse"):
        with pytest.raises(DataError, match="i0"):
            split(manifest, kind="lists", crossing=rule)


def test_several_test_sets_and_a_validation_list():
    manifest = make_manifest([0] * 9, hints=["train", "train", "v", "v", "easy", "hard", "hard", "", ""])
    rows, summary = split(manifest, kind="lists", val="v", test={"one": "easy", "two": "hard"})
    assert rows["test_set"].tolist() == ["", "", "", "", "one", "two", "two"]
    assert summary["sides"]["val"]["n"] == 2
    assert summary["sides"]["test"]["n"] == 3
    assert summary["test_sets"]["two"]["n"] == 2


def test_list_mistakes():
    manifest = make_manifest([0] * 9, hints=LISTED)
    with pytest.raises(ConfigError, match=r"split\.train: unknown name 'tarin'; did you mean 'train'"):
        split(manifest, kind="lists", train="tarin")
    with pytest.raises(ConfigError, match=r"split\.val: unknown name 'dev'"):
        split(manifest, kind="lists", val="dev")
    twice = make_manifest([0] * 3, hints=["train;val", "train", "test"])
    with pytest.raises(DataError, match="images in both train and val: i0"):
        split(twice, kind="lists", val="val")
    with pytest.raises(DataError, match="images in two test sets: i2"):
        split(twice, kind="lists", test={"x": "test", "y": "test"})
    with pytest.raises(DataError, match=r"no image is left for train: .* dropped"):
        split(make_manifest([0] * 2, ["p", "p"], ["train", "test"]), kind="lists")


def test_validation_is_drawn_by_group():
    groups = [f"p{number // 3}" for number in range(60)]
    manifest = make_manifest([number // 3 % 2 for number in range(60)], groups, ["train"] * 45 + ["test"] * 15)
    rows, summary = split(manifest, kind="lists", val=0.2)
    assert summary["sides"]["val"]["n"] == 9
    assert summary["sides"]["train"]["n"] == 36
    assert rows.groupby("group")["side"].nunique().max() == 1
    assert min(summary["sides"]["val"]["classes"][name] for name in "ab") >= 3


# meta set


def meta(manifest, wish, **keys):
    rows, summary = split(manifest, kind="lists", meta_set=wish, **keys)
    return rows[rows["side"] == "meta_set"], summary


def test_meta_set_is_drawn_from_free_groups():
    groups = ["p", "q", "p", "r", "s", "t", "u", "v"]
    manifest = make_manifest([0, 0, 0, 0, 0, 1, 1, 2], groups, ["train", "test", "", "", "", "", "", ""])
    assert set(meta(manifest, {"draw": 5})[0]["image_id"]) == {"i3", "i4", "i5", "i6", "i7"}
    assert sorted(meta(manifest, {"per_class": 1})[0]["label"]) == [0, 1, 2]
    assert sorted(meta(manifest, {"draw": 4, "per_class": 2})[0]["label"])[:3] in ([0, 0, 1], [0, 1, 1])
    with pytest.raises(DataError, match="need 6 images, but 5 are free"):
        meta(manifest, {"draw": 6})
    with pytest.raises(DataError, match="need 2 images a class, but free are c: 1"):
        meta(manifest, {"per_class": 2})


def test_meta_set_from_a_list():
    hints = ["train;m", "test;m", "m", "m", ""]
    manifest = make_manifest([0] * 5, ["p", "q", "p", "r", "s"], hints)
    rows, summary = meta(manifest, {"list": "m"})
    assert rows["image_id"].tolist() == ["i3"]
    assert "3 images of m are not in the meta set" in summary["notes"][0]
    rows, _ = meta(manifest, {"list": "m"}, crossing="keep")
    assert rows["image_id"].tolist() == ["i2", "i3"]
    rows, summary = split(manifest, kind="lists", meta_set={"list": "m"}, crossing="keep")
    assert rows["image_id"][rows["in_meta_set"] == 1].tolist() == ["i0", "i1"]
    assert summary["shared_meta_set"] == {"train": 1, "test": 1}
    assert summary["notes"] == [
        "Of 4 images of the meta set 1 on the side train and 1 on the side test too: kept, as published.",
        "1 more images of the meta set show groups of another side: kept, as published.",
    ]
    with pytest.raises(DataError, match="groups, on another side: i0, i1, i2; see `crossing`"):
        meta(manifest, {"list": "m"}, crossing="refuse")
    with pytest.raises(DataError, match="groups, on another side: i1; see `crossing`"):
        meta(make_manifest([0] * 3, None, ["train", "test;m", "m"]), {"list": "m"}, crossing="refuse")
    with pytest.raises(DataError, match="no image of list m is free; 2 are on other sides"):
        meta(make_manifest([0, 1], None, ["train;m", "test;m"]), {"list": "m"})


@pytest.mark.parametrize("crossing", ["drop", "keep", "refuse"])
def test_a_list_without_images_is_no_meta_set(crossing):
    manifest = make_manifest([0, 1], None, ["train", "test"])
    with pytest.raises(DataError, match="need images in list m, and none of its images is in this dataset"):
        split(manifest, also=["m"], kind="lists", crossing=crossing, meta_set={"list": "m"})


def test_meta_set_of_given_class_counts():
    manifest = make_manifest([0, 0, 0, 0, 1, 1, 2], None, ["train", "test", "", "", "", "", ""])
    rows, summary = meta(manifest, {"counts": {"a": 2, "b": 1, "c": 0}})
    assert sorted(rows["label"]) == [0, 0, 1]
    assert "No image of c on the side meta_set." in summary["notes"]
    with pytest.raises(DataError, match="too few images are free of b: 2 of 3"):
        meta(manifest, {"counts": {"b": 3}})
    with pytest.raises(ConfigError, match="unknown name 'd'"):
        meta(manifest, {"counts": {"d": 1}})
    with pytest.raises(DataError, match=r"missing_class: refuse: No image of c on the side meta_set\."):
        meta(manifest, {"counts": {"a": 1, "b": 1}, "missing_class": "refuse"})
    assert len(meta(manifest, {"per_class": 1, "missing_class": "refuse"})[0]) == 3


def test_meta_set_has_one_source():
    for wish in (
        {},
        {"list": "m", "draw": 1},
        {"counts": {"a": 1}, "per_class": 1},
        {"counts": {"a": -1}},
        {"counts": {"a": 0}},
    ):
        with pytest.raises(ValueError, match=r"give `list`|numbers of images"):
            Split(kind="lists", meta_set=wish)
