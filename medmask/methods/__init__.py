"""The methods by name."""

from collections.abc import Callable

from medmask.config.training import Training
from medmask.errors import lookup
from medmask.methods.base import Method
from medmask.methods.supervised import Supervised
from medmask.models.backbones import Classifier

METHODS: dict[str, Callable[[Classifier, Training], Method]] = {"supervised": Supervised}


def build_method(name: str, network: Classifier, cfg: Training) -> Method:
    """Build a method around a classifier; `cfg` holds the settings of its own, if it has any."""
    return lookup(METHODS, name, "method")(network, cfg)
