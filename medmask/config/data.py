"""Config of the stages data, split and noise."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medmask.config.base import READERS, Block, Fraction, Inside, Int, Mode, Name, Text

Byte = Annotated[Int, Field(ge=0, le=255)]


class Shortcut(Block):
    """A spurious cue that is drawn into images; all images become RGB.

    Images that are not tested carry it at the rate of their class. The test sets are `raw` (no cue), `bias_aligned`
    (the classes that often carry it in training always, the others never) and `bias_conflicting` (the other way round).
    """

    kind: Literal["rectangle", "disc", "ruler", "background", "foreground"] = Field(
        "rectangle",
        description="shape: a square, a disc, ticks as of a ruler across the whole width; or, without size and place, "
        "all pixels whose largest channel is at most 127 of 255 (background), or all others (foreground)",
    )
    size: Int = Field(6, ge=1, description="side, diameter, or length of the ticks; pixels of the packed image")
    colour: tuple[Byte, Byte, Byte] = Field((0, 0, 255), description="RGB, 0 to 255")
    place: Literal["top_left", "top_right", "bottom_left", "bottom_right", "centre", "random"] = Field(
        "top_left", description="where it lies; random: drawn for each image"
    )
    second: bool = Field(
        False, description="one more at the other side, left and right swapped, its colour channels in reversed order"
    )
    margin: Int = Field(
        0, ge=0, description="pixels from the edges of the packed image; what `image` crops away nobody sees"
    )
    rate: dict[Text, Fraction] = Field(
        min_length=1, description="class name: fraction of its training images that carry the cue; 0 for others"
    )
    draw: Literal["each", "exact", "first"] = Field(
        "each",
        description="each image by itself with this probability; exactly so many of a class, rounded; the first ones",
    )
    seed: Int = Field(0, ge=0, description="seed of the draws; cues, like splits, do not follow the run's seed")

    @model_validator(mode="after")
    def says_something(self) -> "Shortcut":
        if not any(self.rate.values()):
            raise ValueError(f"rate: need one above 0, got {self.rate}")
        if self.second and (self.kind not in ("rectangle", "disc") or self.place in ("centre", "random")):
            raise ValueError("second: need a rectangle or a disc in a corner, which has another side")
        placed = {name: getattr(self, name) for name in ("size", "place", "margin") if name in self.model_fields_set}
        if self.kind in ("background", "foreground") and placed:
            raise ValueError(f"kind: {self.kind} has no size and no place, got {placed}")
        return self

    def is_frequent(self, class_name: str) -> bool:
        """Whether a class carries the cue more often than the middle between the rarest and the most frequent one."""
        rates = list(self.rate.values())
        low = min(rates) if len(rates) > 1 else 0.0
        return self.rate.get(class_name, 0.0) > (low + max(rates)) / 2


class Dataset(Block):
    """What is on disk and how it becomes one packed file; the place is `data_root`."""

    reader: Text = Field(description=f"{', '.join(READERS)}, or `file.py:function` (a function of the data folder)")
    folder: Inside = Field("", description="folder below `data_root`")
    labels: Inside | None = Field(None, description="label table below `folder` (isic2019, csv)")
    metadata: Inside | None = Field(None, description="table with `image` and `lesion_id` below `folder` (isic2019)")
    images: Inside | None = Field(None, description="image folder below `folder` (isic2019, csv)")
    lists: dict[Name, Inside] = Field({}, description="name: list of images below `folder`, for `split.kind: lists`")
    classes: tuple[Text, ...] | None = Field(None, description="keep only these classes, in this order")
    relabel: dict[Text, tuple[Text | Int, ...]] | None = Field(None, description="new class: the old classes in it")
    resize: Int | None = Field(None, ge=1, description="shorter side after packing, pixels; null keeps the size")
    shortcut: Shortcut | None = Field(None, description="spurious cue, see below")

    @model_validator(mode="after")
    def known_reader(self) -> "Dataset":
        if self.reader not in READERS and ".py:" not in self.reader:
            raise ValueError(f"reader: need one of {', '.join(READERS)} or file.py:function, got {self.reader!r}")
        if self.reader == "csv" and self.labels is None:
            raise ValueError("labels: reader csv needs the name of its table")
        if self.relabel is not None and self.classes is not None:
            raise ValueError("relabel: contradicts `classes`; give one of the two")
        return self


class MetaSet(Block):
    """Trusted images, from those on no other side; as published a list may share images with other sides."""

    list: Name | None = Field(None, description="name of one of the dataset's lists")
    draw: Int | None = Field(None, ge=1, description="number of images to draw")
    per_class: Int | None = Field(None, ge=1, description="number of images a class; with `draw` at most so many")
    counts: dict[Text, Int] | None = Field(None, min_length=1, description="class: number of images to draw of it")
    missing_class: Literal["warn", "refuse"] = Field(
        "warn", description="a class of the dataset without a trusted image: say so, or refuse"
    )

    @model_validator(mode="after")
    def one_source(self) -> "MetaSet":
        drawn = self.draw is not None or self.per_class is not None
        if sum((self.list is not None, drawn, self.counts is not None)) != 1:
            raise ValueError("meta_set: give `list`, or `draw` and `per_class`, or `counts`")
        if self.counts is not None and (min(self.counts.values()) < 0 or not any(self.counts.values())):
            raise ValueError(f"counts: need numbers of images, one of them above 0, got {self.counts}")
        return self


class Split(Block):
    """Which image goes to which side: train, val, test, meta_set."""

    PUBLISHED = {"by": "image", "crossing": "keep"}

    kind: Literal["stratified", "lists", "folders"] = Field(
        description="stratified: drawn; lists: the dataset's lists; folders: the sides that the source names"
    )
    mode: Mode = Field("corrected", description="preset; as_published sets `by: image`, `crossing: keep`")
    sizes: dict[Literal["train", "val", "test"], Fraction | Int] | None = Field(
        None, description="stratified: fraction or number of images a side"
    )
    seed: Int = Field(0, ge=0, description="seed of the drawing; splits do not follow the run's seed")
    train: Name = Field("train", description="lists, folders: list of the training images")
    test: Name | dict[Name, Name] = Field("test", description="lists, folders: test list, or test set name: list")
    val: Name | Fraction = Field(0.0, description="lists, folders: list, or fraction of the training images")
    meta_set: MetaSet | None = Field(None, description="trusted images")
    by: Literal["group", "image"] = Field("group", description="unit that is drawn; image ignores patients and lesions")
    crossing: Literal["drop", "refuse", "keep"] = Field(
        "drop",
        description="training images of a group that is in the test set: drop them (lists; a drawn split is refused), "
        "refuse, or keep and count",
    )

    @model_validator(mode="after")
    def sizes_fit(self) -> "Split":
        if (self.kind == "stratified") != (self.sizes is not None):
            raise ValueError("sizes: needed with `kind: stratified`, and only there")
        if self.sizes is not None:
            if not {"train", "test"} <= set(self.sizes):
                raise ValueError("sizes: need at least train and test")
            kinds = {isinstance(size, int) for size in self.sizes.values()}
            if len(kinds) > 1:
                raise ValueError(f"sizes: need all fractions or all counts, got {self.sizes}")
            if kinds == {False} and sum(self.sizes.values()) > 1 + 1e-9:
                raise ValueError(f"sizes: fractions sum to {sum(self.sizes.values()):g}, more than 1")
            if min(self.sizes["train"], self.sizes["test"]) <= 0:
                raise ValueError(f"sizes: train and test need images, got {self.sizes}")
        return self


class Noise(Block):
    """Label noise."""

    PUBLISHED = {"sides": ("train",), "targets": "all"}

    kind: Literal["none", "symmetric"] = Field(description="symmetric: each flipped label moves to any other class")
    mode: Mode = Field("corrected", description="preset; as_published sets `sides: [train]`, `targets: all`")
    rate: Fraction = Field(0.0, description="fraction of the labels that change: exactly floor(N * rate) a side")
    sides: tuple[Literal["train", "val"], ...] = Field(("train", "val"), description="sides whose labels change")
    targets: Literal["occurring", "all"] = Field(
        "occurring", description="classes a label can move to: those with images, or all columns of the source"
    )
    seed: Int = Field(0, ge=0, description="set by the experiment's seeds")

    @model_validator(mode="after")
    def rate_fits(self) -> "Noise":
        if (self.kind == "none") != (self.rate == 0):
            raise ValueError(f"rate: `kind: {self.kind}` contradicts a rate of {self.rate:g}")
        if not self.sides:
            raise ValueError("sides: need at least one side")
        return self
