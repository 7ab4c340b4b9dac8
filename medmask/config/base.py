"""Types and the base class of all config blocks. Imports no torch and no numpy."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# Names that a later version adds code for: they parse and plan, and `medmask.runs` refuses to run them.
PLANNED_METHODS = ("noise_mask", "intelligent_masking")
READERS = ("digits", "isic2019", "mnist", "busi", "folders", "csv")
STAGES = ("data", "split", "noise", "pretrain", "mask", "audit", "finetune", "evaluate", "runs", "aggregate")
CLEANLAB = "`method: confident` needs cleanlab: pip install 'medmask[cleanlab]'"
METRICS = (
    "accuracy", "balanced_accuracy", "precision_macro", "recall_macro", "f1_macro", "auroc_macro",
    "sensitivity_at_90_specificity", "ece", "worst_group_accuracy",
)  # fmt: skip


def not_a_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("need a number, got a boolean (YAML reads on, off, yes and no as booleans)")
    return value


def text_not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("need text, got a boolean (YAML reads on, off, yes and no as booleans: put it in quotes)")
    return value


def relative_path(value: str) -> str:
    if value.startswith(("/", "~")) or ".." in value.split("/") or "\0" in value:
        raise ValueError(f"need a path inside the data root, without '..', got {value!r}")
    return value


Int = Annotated[int, BeforeValidator(not_a_bool)]
Float = Annotated[float, BeforeValidator(not_a_bool)]
Text = Annotated[str, BeforeValidator(text_not_bool)]
Inside = Annotated[Text, BeforeValidator(lambda value: relative_path(text_not_bool(value)))]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Name = Annotated[Text, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.+-]*$")]
Mode = Literal["corrected", "as_published"]


def both_dicts(first: Any, second: Any) -> bool:
    return isinstance(first, dict) and isinstance(second, dict)


class Block(BaseModel):
    """A group of keys; unknown keys are refused, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    PUBLISHED: ClassVar[dict[str, Any]] = {}  # what `mode: as_published` sets; a key that is given wins

    @model_validator(mode="before")
    @classmethod
    def apply_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("mode") != "as_published":
            return given
        preset = cls.preset(given)
        inner = {key: {**preset[key], **given[key]} for key in preset if both_dicts(preset[key], given.get(key))}
        return {**preset, **given, **inner}

    @classmethod
    def preset(cls, given: dict[str, Any]) -> dict[str, Any]:
        """What `mode: as_published` sets; for a class where it depends on the keys given, another one."""
        return cls.PUBLISHED


class Needs(Block):
    """What a job asks the cluster for; no part of any key, and `set-resources` in a profile wins."""

    gpu: Int = Field(1, ge=0, le=1, description="GPUs a rank; 0 runs on the CPU")
    cpus: Int = Field(2, ge=1, description="cores a rank")
    mem_gb: Float = Field(8, gt=0, description="memory a rank, GB")
    hours: Float = Field(4, gt=0, description="time limit of one job, hours")
