"""The JSON schema has every key and rejects wrong ones."""

import json
import tomllib
from importlib.resources import files

import pytest

from prunekit.config.prune_table import Prune
from prunekit.config.schema import schema
from prunekit.methods import methods

STARTER = files("prunekit.cli").joinpath("presets", "starter.toml").read_text("utf-8")


def test_the_schema_has_every_key_and_one_table_for_each_method():
    made = schema()
    assert "null" not in json.dumps(made)
    tables = {
        table["properties"]["method"]["const"]: table for table in made["$defs"]["Prune"]["oneOf"]
    }
    assert list(tables) == list(methods())
    for name, kind in methods().items():
        keys = Prune.model_fields.keys() | kind.model_fields.keys()
        assert tables[name]["properties"].keys() == keys
        assert tables[name]["required"] == ["method", "pattern"]
        assert all(tables[name]["properties"][key]["description"] for key in keys)


def test_the_schema_takes_what_is_right_and_nothing_else():
    jsonschema = pytest.importorskip("jsonschema")
    made = schema()
    jsonschema.validate(tomllib.loads(STARTER), made)
    for key, value in {"damping": 3, "patern": "2:4", "method": "x", "activation_power": 1}.items():
        wrong = tomllib.loads(STARTER)
        wrong["prune"][key] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, made)
