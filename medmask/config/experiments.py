"""Config of evaluation and of experiments, and the whole config file."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from medmask.config.base import METRICS, Block, Float, Int, Name, Needs, Text
from medmask.config.data import Dataset, Noise, Split
from medmask.config.finetuning import AnyFinetuning, SaliencyMaps, Source
from medmask.config.training import Pretraining


class Evaluation(Block):
    """How a network is judged."""

    test_sets: tuple[Name, ...] | None = Field(None, description="test sets of the split; null: all")
    metrics: tuple[Literal[METRICS], ...] = Field(  # type: ignore[valid-type]
        ("accuracy", "balanced_accuracy", "auroc_macro"), description="rows of summary.csv; part of no evaluation key"
    )
    draws: Int = Field(2000, ge=100, description="bootstrap draws over groups")
    coverages: tuple[Annotated[Float, Field(gt=0, le=1)], ...] = Field(
        (), description="selective classification: shares of the validation images to answer, such as [0.8, 0.9, 1.0]"
    )
    leak: Literal["refuse", "count"] = Field(
        "refuse", description="test images that starting weights have been trained on: refuse, or count and say so"
    )
    needs: Needs = Field(Needs(gpu=1, hours=1), description="what the job asks for; no part of any key")


class Row(Block):
    """One row of an experiment: a choice, or a list of choices, for each block."""

    dataset: Name | tuple[Name, ...] | None = Field(None, description="block or blocks of `datasets`")
    split: Name | tuple[Name, ...] | None = Field(None, description="block or blocks of `splits`")
    noise: Name | tuple[Name, ...] | None = Field(None, description="block or blocks of `noises`")
    pretrain: Name | Source | tuple[Name | Source, ...] | None = Field(
        None, description="block or blocks of `pretrainings`, `none`, or another run as {run: ...}"
    )
    finetune: Name | tuple[Name, ...] | None = Field(None, description="block or blocks of `finetunings`, or `none`")
    evaluate: Name | tuple[Name, ...] | None = Field(None, description="block or blocks of `evaluations`")
    set: dict[Text, Any] = Field({}, description="stage.key: a value, or a list of values as an axis")
    exclude: tuple[dict[Text, Any], ...] = Field((), description="cells to leave out, by field or path")
    label: Text | None = Field(None, description="name of the row in the table")


class Published(Block):
    """A number from the paper, to stand beside ours."""

    run: Name = Field(description="row")
    where: dict[Text, Any] = Field({}, description="field: value of the cell")
    metric: Literal[METRICS] = "accuracy"  # type: ignore[valid-type]
    test_set: Name = "test"
    value: Float = Field(description="the number")
    n: Int | None = Field(None, ge=1, description="test images behind it")
    not_comparable: Text | None = Field(None, description="why it cannot be compared, if so")
    source: Text = Field(description="table or page it stands in")


class Claim(Block):
    """What the run is to decide, written down before it."""

    contrast: tuple[Name, Name] = Field(description="rows a and b: is a minus b above the margin?")
    where: dict[Text, Any] = Field({}, description="field: value of the cells compared")
    against: dict[Text, Any] = Field({}, description="field: value of the cells of row b, where they differ")
    metric: Literal[METRICS] = "accuracy"  # type: ignore[valid-type]
    test_set: Name = "test"
    selection: Literal["last", "best"] = "last"
    margin: Float = Field(0.0, description="difference that must be exceeded")
    text: Text | None = Field(None, description="the claim in words")

    @model_validator(mode="after")
    def two_sides(self) -> "Claim":
        if self.contrast[0] == self.contrast[1] and not self.against:
            raise ValueError(f"contrast: {self.contrast[0]} with itself; say in `against` where the second differs")
        return self


class Table(Block):
    """Shape of the table."""

    columns: Name | None = Field(None, description="field whose values become columns, such as noise")
    metric: Literal[METRICS] = Field("accuracy", description="number in the cells")  # type: ignore[valid-type]
    decimals: Int = Field(3, ge=0, le=6, description="digits after the point")
    test_set: Name = Field("test", description="test set of the cells")
    selection: Literal["last", "best"] = Field("last", description="last epoch, or the best on validation")


class Experiment(Row):
    """Rows, seeds, and what is to be learnt from them; its own fields are defaults of its rows."""

    title: Text | None = Field(None, description="heading of table and report")
    runs: dict[Name, Row] = Field(min_length=1, description="name: row")
    seeds: tuple[Annotated[Int, Field(ge=0)], ...] = Field((0,), min_length=1, description="one run of each row a seed")
    seed_stages: tuple[Literal["noise", "pretrain", "mask", "finetune"], ...] = Field(
        ("noise", "pretrain", "mask", "finetune"), description="stages that follow the seeds; the others use seed 0"
    )
    reference: Name | None = Field(None, description="row that the others are compared with")
    published: tuple[Published, ...] = Field((), description="numbers of the paper")
    claim: Claim | None = Field(None, description="what is to be decided")
    table: Table = Field(Table(), description="shape of the table")

    @model_validator(mode="after")
    def seeds_differ(self) -> "Experiment":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: need different ones, got {list(self.seeds)}")
        return self


class Config(Block):
    """A whole config file."""

    data_root: Text = Field("data", description="folder that holds the datasets; part of no key")
    datasets: dict[Name, Dataset] = Field(description="named blocks, see below")
    splits: dict[Name, Split]
    noises: dict[Name, Noise] = {}
    pretrainings: dict[Name, Pretraining] = {}
    masks: dict[Name, SaliencyMaps] = {}
    finetunings: dict[Name, AnyFinetuning] = {}
    evaluations: dict[Name, Evaluation] = {}
    experiments: dict[Name, Experiment] = Field(min_length=1)
