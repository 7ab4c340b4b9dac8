"""The methods by name."""

from collections.abc import Callable
from typing import Any

from medmask.errors import lookup
from medmask.methods.base import Method
from medmask.methods.confident import Confident
from medmask.methods.elr import ELR
from medmask.methods.gce import GCE
from medmask.methods.meta_learning import MetaLearning
from medmask.methods.supervised import Supervised
from medmask.models.backbones import Classifier

METHODS: dict[str, Callable[[Classifier, Any], Method]] = {
    "supervised": Supervised,
    "reweight": MetaLearning,
    "refurbish": MetaLearning,
    "proposal": MetaLearning,
    "upper_bound": MetaLearning,
    "gce": GCE,
    "elr": ELR,
    "fold": Supervised,
    "confident": Confident,
}


def build_method(name: str, network: Classifier, cfg: Any) -> Method:
    """Build a method around a classifier; `cfg` holds the settings of its own, if it has any."""
    return lookup(METHODS, name, "method")(network, cfg)
