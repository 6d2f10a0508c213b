"""The JSON schema has every key, and names the one that is wrong."""

import json
import tomllib
from importlib.resources import files

import pytest

from prunekit.config.prune_table import Prune
from prunekit.config.schema import schema
from prunekit.methods import methods
from prunekit.structured.rankers import rankers

PRESETS = files("prunekit.cli").joinpath("presets")
STARTER = PRESETS.joinpath("starter.toml").read_text("utf-8")


def tables(made, name):
    return {
        choice["then"]["properties"]["method"]["const"]: choice["then"]
        for choice in made["$defs"][name]["allOf"]
        if "properties" in choice["if"]
    }


def test_the_schema_has_every_key_and_one_table_for_each_method():
    made = schema()
    assert '"null"' not in json.dumps(made)
    found = tables(made, "Prune")
    assert list(found) == list(methods())
    default = made["$defs"]["Prune"]["allOf"][-1]
    assert default == {"if": {"not": {"required": ["method"]}}, "then": found["admm"]}
    assert list(tables(made, "StructuredPrune")) == list(rankers())
    for name, kind in methods().items():
        keys = Prune.model_fields.keys() | kind.model_fields.keys()
        assert found[name]["properties"].keys() == keys
        assert found[name]["required"] == []
        assert all(found[name]["properties"][key]["description"] for key in keys)


@pytest.mark.parametrize("preset", [each.name for each in PRESETS.iterdir()])
def test_every_preset_is_right(preset):
    jsonschema = pytest.importorskip("jsonschema")
    made = schema()
    jsonschema.Draft202012Validator.check_schema(made)
    jsonschema.validate(tomllib.loads(PRESETS.joinpath(preset).read_text("utf-8")), made)


def wrong(**keys):
    values = tomllib.loads(STARTER)
    values["prune"] |= keys
    return values


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"damping": "3"}, "'3' is not of type 'number'"),
        ({"patern": "2:4"}, "'patern' was unexpected"),
        ({"method": "x"}, "'x' is not one of"),
        ({"activation_power": 1}, "'activation_power' was unexpected"),
        ({"method": "ria", "activation_powr": 1}, "'activation_powr' was unexpected"),
        ({"pattern": "heads", "method": "obs", "powr": 1}, "'powr' was unexpected"),
        ({"pattern": ["heads"], "method": "wanda"}, "'wanda' is not one of"),
    ],
)
def test_a_mistake_is_named_and_nothing_else(keys, words):
    jsonschema = pytest.importorskip("jsonschema")
    errors = [*jsonschema.Draft202012Validator(schema()).iter_errors(wrong(**keys))]
    assert words in " ".join(error.message for error in errors), errors
    assert {error.path[0] for error in errors} == {"prune"}


def test_a_sweep_may_hold_method_and_pattern_in_its_lists():
    jsonschema = pytest.importorskip("jsonschema")
    made, values = schema(), tomllib.loads(STARTER)
    del values["prune"]["method"], values["prune"]["pattern"]
    jsonschema.validate(values, made)  # both have defaults
    values["sweep"] = {"method": ["wanda", {"name": "ria"}], "pattern": ["2:4", "unstructured"]}
    jsonschema.validate(values, made)
    values["prune"]["sparsty"] = 0.5
    with pytest.raises(jsonschema.ValidationError, match="'sparsty' was unexpected"):
        jsonschema.validate(values, made)
    values["sweep"]["method"] = "wanda"
    del values["prune"]["sparsty"]
    with pytest.raises(jsonschema.ValidationError, match="is not of type 'array'"):
        jsonschema.validate(values, made)
