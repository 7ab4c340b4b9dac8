"""Config of the stages finetune and mask: one class a method."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from medmask.config.base import Block, Float, Fraction, Int, Name, Needs
from medmask.config.training import Supervised, Training


class Source(Block):
    """Another network of the experiment: the run named, or this run, with these fields changed."""

    run: Name | None = Field(None, description="a row of the experiment; null: this run")
    dataset: Name | None = None
    split: Name | None = None
    noise: Name | None = None
    pretrain: Name | None = None
    finetune: Name | None = None


Checkpoint = Literal["last", "best"]


class MaskRule(Block):
    """From saliency maps, which run from 0 to 1, to masks."""

    kind: Literal["threshold", "top_k", "mean", "official", "random", "cutout"] = Field(
        description="what is hidden: above `strength`; the top share `strength`; above `strength` times the mean; "
        "above mean + 2 sd of the positive pixels; as top_k, but moved to a random place; one square at a random "
        "place, its side between 1/14 and 1/2 of the image's"
    )
    strength: Fraction = Field(0.1, description="parameter of the rule; official and cutout have none")
    resolution: Literal["map", "image"] = Field(
        "map", description="apply the rule to the map as it is, or after bilinear resizing to the image"
    )
    edges: Literal["hard", "soft"] = Field(
        "hard", description="resizing of masks at map resolution: nearest, or bilinear as in the notebook"
    )
    cumulative: bool = Field(
        False, description="with `after`: hide what the rounds before hid too, and explain the images as they left them"
    )

    @model_validator(mode="after")
    def parts_fit(self) -> "MaskRule":
        if self.edges == "soft" and self.resolution == "image":
            raise ValueError("edges: masks at image resolution are not resized, so `soft` has no meaning there")
        if self.cumulative and self.kind in ("random", "cutout"):
            raise ValueError(f"cumulative: need a rule that hides salient places, got {self.kind}")
        return self


class Finetuning(Training):
    """Keys that only finetunings have."""

    freeze: Literal["none", "all"] | Annotated[Int, Field(ge=1)] = Field(
        "none", description="part of the backbone that stays: all, or all but the last n stages"
    )
    after: Name | None = Field(None, description="start from this finetuning of the same run")
    checkpoint: Checkpoint = Field("last", description="epoch of the starting network: its last, or its best one")
    optimizer_state: Literal["fresh", "continued"] = Field(
        "fresh", description="momenta at the start: none, or those of the starting network, which has `keep_optimizer`"
    )
    masks: Name | None = Field(None, description="hide what the starting network looks at in the training images")
    mask_rule: MaskRule | None = Field(None, description="see below")

    @model_validator(mode="after")
    def masks_fit(self) -> "Finetuning":
        if (self.masks is None) != (self.mask_rule is None):
            raise ValueError("mask_rule: needed with `masks`, and only there")
        if self.masks is not None and self.augment.crop_scale is not None:
            raise ValueError("augment.crop_scale: masks are of the image as the network sees it; drop random crops")
        return self


class SupervisedFinetuning(Finetuning):
    """Cross-entropy on the labels of the training side."""

    PUBLISHED = Supervised.PUBLISHED
    method: Literal["supervised"]


class GeneralisedCrossEntropy(Finetuning):
    """Generalised cross-entropy (1 - p^q) / q. Source: Zhang and Sabuncu, NeurIPS 2018, arXiv 1805.07836."""

    method: Literal["gce"]
    q: Fraction = Field(0.7, gt=0, description="towards 0 it is cross-entropy, at 1 half the absolute error")


class EarlyLearning(Finetuning):
    """Early-learning regularisation. Source: Liu et al., NeurIPS 2020, arXiv 2007.00151."""

    method: Literal["elr"]
    strength: Float = Field(3.0, ge=0, description="factor of the regulariser")
    memory: Fraction = Field(0.7, description="share of the old target that a new prediction leaves")


class Fold(Finetuning):
    """Cross-entropy without one fold of the training images: what `confident` makes for each of its folds."""

    PUBLISHED = Supervised.PUBLISHED
    method: Literal["fold"]
    fold: Int = Field(ge=0, description="the one that is left out")
    folds: Int = Field(ge=2, description="nearly equal parts of the training images; groups and classes as in a split")

    @model_validator(mode="after")
    def fold_fits(self) -> "Fold":
        if self.fold >= self.folds:
            raise ValueError(f"fold: need one of 0..{self.folds - 1}, got {self.fold}")
        if "train" not in self.train_on:
            raise ValueError(f"train_on: need train, whose images are shared out, got {list(self.train_on)}")
        return self


class ConfidentLearning(Finetuning):
    """Cross-entropy after probable label errors, found by cross-validation of this very training, are dealt with.

    Source: Northcutt et al., JAIR 2021, arXiv 1911.00068; library cleanlab. Differs: no reweighting of classes.
    """

    PUBLISHED = Supervised.PUBLISHED
    method: Literal["confident"]
    folds: Int = Field(4, ge=2, description="trainings before this one; each judges the labels it has not seen")
    errors: Literal["remove", "reweight"] = Field(
        "remove", description="train without the errors found, or weight them by how likely their label is"
    )

    @model_validator(mode="after")
    def labels_fit(self) -> "ConfidentLearning":
        if "train" not in self.train_on:
            raise ValueError(f"train_on: need train, since trusted labels have no errors, got {list(self.train_on)}")
        if self.train_labels == "true":
            raise ValueError("train_labels: need noisy, since true labels have no errors")
        return self

    def left_out(self, fold: int) -> Fold:
        """The training that judges the labels of one fold: this one without them."""
        own = {name: getattr(self, name) for name in Finetuning.model_fields}
        return Fold(**own, method="fold", fold=fold, folds=self.folds)


class Audit(Block):
    """Search for wrong labels of training images, by networks that have not trained on them."""

    folds: Int = Field(ge=2, description="number of networks")
    train_on: tuple[Literal["train", "meta_set"], ...] = Field(
        ("train",), description="what they were trained on; trusted images are not judged where it is the meta set too"
    )
    seed: Int = Field(0, ge=0, description="that of the trainings")
    needs: Needs = Field(Needs(), description="what the job asks for; no part of any key")


class Meta(Block):
    """The trusted batch of a step."""

    size: Int | None = Field(5, ge=1, description="images; null: the whole meta set")
    refresh: Literal["each_step", "once"] = Field(
        "each_step", description="once: the same images, changed at random once, for the whole training"
    )
    scope: Literal["global", "rank"] = Field(
        "global",
        description="global: one trusted batch for all ranks, and weights and sums over the batch of all; "
        "rank: each rank for itself",
    )


META_PUBLISHED: dict[str, Any] = {
    **Supervised.PUBLISHED, "momentum": 0.0, "rescale": "none", "clip_norm": 0.25, "drop_last": True, "epsilon": 1e-10,
    "meta": {"refresh": "once", "scope": "rank"},
}  # fmt: skip


class MetaLearning(Finetuning):
    """What the methods share that learn from a step's effect on trusted images."""

    meta: Meta = Field(Meta(), description="see below")
    rescale: Literal["none", "lr", "std"] = Field(
        "std",
        description="agreement with the trusted batch, before a sigmoid: as it is, over `lr`, or standardised over "
        "the batch",
    )
    gradient: Literal["exact", "last_layer"] = Field(
        "exact", description="last_layer: an approximation by the gradients of the last linear layer alone, far cheaper"
    )
    epsilon: Float = Field(
        0.0,
        ge=0,
        description="added to the sum of weights, and to probabilities of soft targets; with 0 a step whose weights "
        "are all 0 is skipped, above it momentum and decay act in it",
    )

    @model_validator(mode="after")
    def meta_fits(self) -> "MetaLearning":
        if self.accumulate > 1:
            raise ValueError(f"accumulate: need 1, since weights rest on the whole batch, got {self.accumulate}")
        if self.meta.scope == "rank" and self.sync_bn:
            raise ValueError("meta.scope: rank makes the number of ranks matter: set `sync_bn: false` too, or `global`")
        return self


class Reweight(MetaLearning):
    """Learning to reweight examples. Source: Ren et al., ICML 2018, arXiv 1803.09050."""

    PUBLISHED = {**META_PUBLISHED, "weights": "sigmoid"}
    method: Literal["reweight"]
    weights: Literal["clamp", "sigmoid"] = Field("clamp", description="from agreement to weight")


class Refurbish(MetaLearning):
    """Labels blended with predictions by a trust that the trusted images teach."""

    PUBLISHED = {**META_PUBLISHED, "reduction": "sum", "clip_norm": None, "meta": {"scope": "rank"}}
    PUBLISHED_HARD: ClassVar[dict[str, Any]] = {
        **META_PUBLISHED,
        "reduction": "sum",
        "epsilon": 0.0,
        "blend": "index",
        "drop_last": False,
    }
    method: Literal["refurbish"]
    targets: Literal["hard", "soft"] = Field(
        "soft", description="blend with the predicted class; or a table of soft labels with the prediction"
    )
    blend: Literal["loss", "choose", "index"] = Field(
        "loss", description="hard: the two losses, the likelier of the two labels, or their numbers, cut to a whole one"
    )
    reduction: Literal["mean", "sum"] = Field("mean", description="of the losses over the batch")

    @classmethod
    def preset(cls, given: dict[str, Any]) -> dict[str, Any]:
        return cls.PUBLISHED_HARD if given.get("targets") == "hard" else cls.PUBLISHED


class Proposal(MetaLearning):
    """Reweighting and refurbishment together."""

    PUBLISHED = {**META_PUBLISHED, "epsilon": 0.0, "blend": "index", "alternate": True}
    method: Literal["proposal"]
    weights: Literal["clamp", "sigmoid"] = Field("sigmoid", description="from agreement to weight")
    targets: Literal["hard", "soft"] = Field("hard", description="as for refurbish")
    blend: Literal["loss", "choose", "index"] = Field("loss", description="as for refurbish")
    alternate: bool = Field(
        False,
        description="even steps renew the weights, odd ones the trust; the other is that of the step before's images",
    )

    @model_validator(mode="after")
    def alternate_fits(self) -> "Proposal":
        if self.alternate and not self.drop_last:
            raise ValueError("alternate: needs `drop_last: true`, since a step takes over values of the one before")
        return self


class UpperBound(MetaLearning):
    """Reweighting with the labels of a teacher for flipped images: what knowing the flips would give."""

    PUBLISHED = META_PUBLISHED
    method: Literal["upper_bound"]
    teacher: Source | None = Field(None, description="needed: the network whose predictions replace flipped labels")
    weights: Literal["clamp", "sigmoid"] = Field("sigmoid", description="from agreement to weight")
    targets: Literal["hard", "soft"] = Field("hard", description="the teacher's class, or its probabilities")


class SaliencyMaps(Block):
    """Saliency maps of the starting network, for all training images, at the size of its layer."""

    method: Literal["xgradcam", "gradcam"]
    layer: Name = Field("last_relu", description="activation that is explained: the last one before pooling, or a name")
    target: Literal["true", "predicted"] = Field(
        "true", description="class that is explained; true: as the dataset has it, whatever the label noise"
    )
    checkpoint: Checkpoint = Field("last", description="epoch of the network that is explained: its last, or best one")
    epsilon: Float = Field(
        1e-8, ge=0, description="xgradcam: added to the sum of a channel; 1e-8 in torchcam, 1e-7 in pytorch-grad-cam"
    )
    needs: Needs = Field(Needs(hours=1), description="what the job asks for; no part of any key")


class Explanation(SaliencyMaps):
    """Settings of the stage mask: the maps that are wanted, and what hid parts of the images before."""

    hidden_by: MaskRule | None = Field(None, description="rule of the earlier rounds of cumulative masks")


AnyFinetuning = Annotated[
    SupervisedFinetuning
    | Reweight
    | Refurbish
    | Proposal
    | UpperBound
    | GeneralisedCrossEntropy
    | EarlyLearning
    | Fold
    | ConfidentLearning,
    Field(discriminator="method"),
]
