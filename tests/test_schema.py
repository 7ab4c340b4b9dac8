"""The schema and the key tables are those of the models, and names agree between config and code."""

import json
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml

from medmask.config.base import PLANNED_METHODS, READERS
from medmask.config.experiments import Config
from medmask.config.training import Head
from medmask.data.readers import READERS as READER_FUNCTIONS
from medmask.methods import METHODS
from medmask.models.heads import HEADS
from medmask.schema import MARK, key_tables, method_models, schema_text

ROOT = Path(__file__).parents[1]


def test_the_schema_is_current():
    """After a change of the config: make schema."""
    assert (ROOT / "workflow/schemas/config.schema.json").read_text() == schema_text()


def test_the_key_tables_are_current():
    text = (ROOT / "config/README.md").read_text()
    assert text[text.index(MARK) :] == key_tables()


def test_every_key_is_explained():
    def keys(schema):
        for model in schema["$defs"].values():
            for name, field in model.get("properties", {}).items():
                yield model["title"], name, field

    for title, name, _ in keys(Config.model_json_schema()):
        assert f"`{name}`" in key_tables() or name == "seed", f"{title}.{name}"


@pytest.mark.parametrize(
    "path", [ROOT / "config/config.yaml", *sorted((ROOT / "config/papers").glob("*.yaml"))], ids=str
)
def test_configs_fit_the_schema(path):
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(schema_text()))


def test_methods_of_the_config_have_code_or_are_planned():
    names = {get_args(model.model_fields["method"].annotation)[0] for model in method_models()}
    assert names - set(PLANNED_METHODS) - {"weights"} == set(METHODS)


def test_heads_and_readers_of_the_config_have_code():
    assert set(get_args(Head.model_fields["kind"].annotation)) == set(HEADS)
    assert set(READERS) == set(READER_FUNCTIONS)
