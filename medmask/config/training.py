"""Config of the stages pretrain, mask and finetune: one class a method."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medmask.config.base import Block, Float, Fraction, Int, Mode, Name, Needs, Text


class Image(Block):
    """From packed pixels to the tensor that a network sees; the same for training and evaluation."""

    size: Int | None = Field(None, ge=1, description="side of the square the network sees, pixels; null: as packed")
    resize: Int | None = Field(None, ge=1, description="shorter side before the centre crop, pixels; null: `size`")
    channels: Literal[1, 3] = Field(3, description="grey images are repeated to 3 channels, colour averaged to 1")
    mean: tuple[Float, ...] = Field((0.5,), description="subtracted from pixels in 0..1; one value or one a channel")
    std: tuple[Annotated[Float, Field(gt=0)], ...] = Field((0.5,), description="divisor after that")

    @model_validator(mode="after")
    def sizes_fit(self) -> "Image":
        if self.resize is not None and (self.size is None or self.resize < self.size):
            raise ValueError(f"resize: need at least `size` ({self.size}), got {self.resize}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name}: need 1 or {self.channels} values, got {len(values)}")
        return self


class Augment(Block):
    """Random changes of training images; drawn from (seed, epoch, image) alone."""

    flip: Fraction = Field(0.0, description="probability of a horizontal flip")
    vertical_flip: Fraction = Field(0.0, description="probability of a vertical flip")
    rotate: Float = Field(0.0, ge=0, le=180, description="degrees to either side, nearest pixel, black corners")
    crop_scale: tuple[Fraction, Fraction] | None = Field(None, description="area range of a random resized crop")
    crop_ratio: tuple[Float, Float] = Field((3 / 4, 4 / 3), description="aspect ratio range of that crop")

    @model_validator(mode="after")
    def ranges_fit(self) -> "Augment":
        for name, pair in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if pair is not None and not 0 < pair[0] <= pair[1]:
                raise ValueError(f"{name}: need 0 < low <= high, got {list(pair)}")
        return self


class Head(Block):
    """What turns pooled features into class scores."""

    kind: Literal["linear", "mlp_bn", "nonlinear", "conv", "convskip"] = Field(
        "linear",
        description="mlp_bn: linear, batch norm, ReLU, linear; nonlinear, conv, convskip: of the transfer paper",
    )
    hidden: Int = Field(256, ge=1, description="mlp_bn: width")
    ratio: Float = Field(0.5, gt=0, description="nonlinear, conv, convskip: hidden width over input width")
    filters: Int = Field(4, ge=1, description="conv, convskip: number of filters")
    kernel: Int = Field(2, ge=1, description="conv, convskip: filter length")
    dropout: Fraction = Field(0.5, description="nonlinear, conv, convskip: probability of a zero")


class Schedule(Block):
    """Learning rate as a function of the epoch, after warm-up."""

    kind: Literal["constant", "step", "cosine", "exponential"] = Field("constant", description="shape")
    every: Int = Field(30, ge=1, description="step: epochs between drops")
    gamma: Float = Field(0.1, gt=0, le=1, description="step, exponential: factor of a drop, of an epoch")
    floor: Fraction = Field(0.0, description="cosine: fraction of `lr` at the end")


class Warmup(Block):
    """Linear growth of the learning rate at the start."""

    epochs: Int = Field(0, ge=0, description="length; 0 is none")
    factor: Fraction = Field(0.01, description="fraction of `lr` at the start")


class DataRef(Block):
    """The data of a block that trains elsewhere than its run."""

    dataset: Name
    split: Name
    noise: Name = "none"


class Training(Block):
    """Keys of every training, pretraining or finetuning."""

    PUBLISHED = {"order": "fixed", "sync_bn": False}

    mode: Mode = Field("corrected", description="preset; what as_published sets is said above")
    data: DataRef | None = Field(None, description="own dataset, split and noise; null: the run's")
    backbone: Name | None = Field(None, description="network; null takes that of the starting weights")
    head: Head = Field(Head(), description="see below")
    image: Image | None = Field(None, description="see below; null takes that of the starting weights")
    augment: Augment = Field(Augment(), description="see below")
    epochs: Int = Field(ge=1, description="passes over the training images")
    batch_size: Int = Field(ge=1, description="images in a step over all ranks together")
    optimizer: Literal["sgd", "adam", "adamw"] = Field("sgd", description="update rule")
    lr: Float = Field(gt=0, description="what the optimizer gets, whatever the number of ranks")
    momentum: Float = Field(0.9, ge=0, lt=1, description="sgd")
    nesterov: bool = Field(False, description="sgd")
    weight_decay: Float = Field(0.0, ge=0, description="L2 term; decoupled for adamw")
    schedule: Schedule = Field(Schedule(), description="see below")
    warmup: Warmup = Field(Warmup(), description="see below")
    order: Literal["reshuffled", "fixed", "file"] = Field(
        "reshuffled", description="a new order each epoch, one random order for all, or the order of the split file"
    )
    drop_last: bool = Field(False, description="leave out the last, smaller batch of an epoch")
    accumulate: Int = Field(1, ge=1, description="parts a batch is cut into to save memory")
    clip_norm: Float | None = Field(None, gt=0, description="largest L2 norm of all gradients together")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 runs the network under autocast")
    sync_bn: bool = Field(True, description="batch norm over all ranks; without it the number of ranks matters")
    train_mode: Literal["always", "first_step"] = Field(
        "always", description="first_step: only the first step of an epoch uses batch statistics"
    )
    train_on: tuple[Literal["train", "meta_set"], ...] = Field(
        ("train",), min_length=1, description="sides whose images are trained on"
    )
    train_labels: Literal["noisy", "true"] = Field("noisy", description="labels of the training images")
    validation_labels: Literal["noisy", "true"] = Field("noisy", description="labels that choose the best epoch")
    select: Literal["balanced_accuracy", "accuracy", "loss"] = Field(
        "balanced_accuracy", description="validation number that chooses the best epoch"
    )
    keep_optimizer: bool = Field(
        False, description="write the optimizer's last momenta into the model file, for `optimizer_state: continued`"
    )
    record_every: Int = Field(
        5, ge=1, description="epochs between tables of what is known of each image; the last has one"
    )
    ranks: Int = Field(1, ge=1, description="processes; no part of the key while `sync_bn` is on")
    workers: Int = Field(0, ge=0, description="loading processes a rank; no part of any key")
    needs: Needs = Field(Needs(), description="see below; no part of any key")
    seed: Int = Field(0, ge=0, description="set by the experiment's seeds")

    @model_validator(mode="after")
    def batch_fits(self) -> "Training":
        if len(set(self.train_on)) < len(self.train_on):
            raise ValueError(f"train_on: need different sides, got {list(self.train_on)}")
        if self.batch_size < self.ranks:
            raise ValueError(f"batch_size: {self.batch_size} images cannot be shared by {self.ranks} ranks")
        if self.sync_bn is False and self.batch_size % self.ranks:
            raise ValueError(
                f"batch_size: without sync_bn need a multiple of {self.ranks} ranks, got {self.batch_size}"
            )
        if self.accumulate > 1 and self.batch_size < 2 * self.accumulate * self.ranks:
            raise ValueError(f"accumulate: {self.accumulate} parts of {self.batch_size} images leave ranks without any")
        if self.backbone == "small_cnn" and self.image is not None and self.image.size not in (None, 28):
            raise ValueError(f"image.size: small_cnn needs 28, got {self.image.size}")
        if self.warmup.epochs >= self.epochs:
            raise ValueError(f"warmup.epochs: {self.warmup.epochs} of {self.epochs} epochs leave nothing after it")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("nesterov: needs `optimizer: sgd` with momentum")
        return self


class Supervised(Training):
    """Cross-entropy on the labels of the training side."""

    PUBLISHED = {**Training.PUBLISHED, "train_mode": "first_step"}
    method: Literal["supervised"]


class Weights(Block):
    """A pretraining that is loaded, not trained."""

    method: Literal["weights"]
    source: Literal["file", "torchvision", "timm"] = Field(description="where the weights come from")
    backbone: Name = Field(description="network that the weights belong to")
    version: Text = Field("IMAGENET1K_V1", description="source torchvision: name of the weights")
    file: Text | None = Field(None, description="source file: a .safetensors or .pt file")
    sha256: Annotated[Text, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        None, description="digest that is checked: of the file (timm: of the tensors), as record.json has it"
    )
    image: Image = Field(
        Image(size=224, resize=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        description="how the weights want their images",
    )

    @model_validator(mode="after")
    def file_given(self) -> "Weights":
        if (self.source == "file") != (self.file is not None):
            raise ValueError("file: needed with `source: file`, and only there")
        return self


class NoiseMask(Training):
    """Policy-gradient noise masks (a later version)."""

    method: Literal["noise_mask"]
    grid: Int = Field(64, ge=1, description="cells a side")


class IntelligentMasking(Training):
    """Inpainting with a block chosen by Q-learning (a later version)."""

    method: Literal["intelligent_masking"]
    block: Int = Field(2, ge=1, description="side of the masked block in cells")


Pretraining = Annotated[Supervised | Weights | NoiseMask | IntelligentMasking, Field(discriminator="method")]
