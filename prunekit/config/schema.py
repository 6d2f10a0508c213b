"""JSON schema of a config file."""

from collections.abc import Iterable
from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core.core_schema import NullableSchema, WithDefaultSchema

from prunekit.config.prune_table import DEFAULT_METHOD
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.config.sweep_table import Sweep
from prunekit.models.units.kinds import KINDS

Schema = dict[str, Any]
UNIT_PATTERN: Schema = {"anyOf": [{"enum": [*KINDS]}, {"type": "array"}]}


def schema() -> Schema:
    """Return the JSON schema of configs, for completion in editors.

    The table of ``[prune]`` is chosen by its pattern and method, so that an editor names the key
    that is wrong. In a sweep any key of any method is allowed, as its list may hold the method.
    """
    made, units = (
        kind.model_json_schema(schema_generator=_TomlSchema) for kind in (Config, StructuredConfig)
    )
    made["$defs"] = units["$defs"] | made["$defs"]
    tables = [
        _by_method(made["$defs"], name, default)
        for name, default in (("Prune", DEFAULT_METHOD), ("StructuredPrune", None))
    ]
    of_units = {"properties": {"pattern": UNIT_PATTERN}, "required": ["pattern"]}
    weights, structured = ({"$ref": f"#/$defs/{name}"} for name in ("Prune", "StructuredPrune"))
    made["$defs"]["SweptPrune"] = _any_method([each for table in tables for each in table])
    made["properties"]["prune"] = {"description": made["properties"]["prune"]["description"]}
    made["properties"]["sweep"] = Sweep.model_json_schema(schema_generator=_TomlSchema)
    made["required"] = [key for key in made["required"] if key != "prune"]
    made["anyOf"] = [{"required": ["prune"]}, {"required": ["apt"]}]
    made["if"] = {"required": ["sweep"]}
    made["then"] = {"properties": {"prune": {"$ref": "#/$defs/SweptPrune"}}}
    one = {"if": of_units, "then": structured, "else": weights}
    made["else"] = {"properties": {"prune": one}}
    return made


def _by_method(definitions: Schema, name: str, default: str | None) -> list[Schema]:
    """Replace a choice of tables by one that follows from the key ``method``.

    Args:
        definitions: Definitions of the schema.
        name: Name of the choice.
        default: The method that is meant without this key; None: the key is required.

    Returns:
        The table of each method.
    """
    choice = definitions[name]
    tables = choice.pop("oneOf")
    choice.pop("discriminator", None)
    methods = {"enum": [table["properties"]["method"]["const"] for table in tables]}
    choice |= {"type": "object", "properties": {"method": methods}}
    if default is None:
        choice["required"] = ["method"]
    choice["allOf"] = [
        {
            "if": {
                "properties": {"method": {"const": table["properties"]["method"]["const"]}},
                "required": ["method"],
            },
            "then": table,
        }
        for table in tables
    ]
    choice["allOf"] += [
        {"if": {"not": {"required": ["method"]}}, "then": table}
        for table in tables
        if table["properties"]["method"]["const"] == default
    ]
    return tables


def _any_method(tables: Iterable[Schema]) -> Schema:
    """Return a table with the keys of all methods, none required."""
    keys: dict[str, list[Schema]] = {}
    for table in tables:
        for key, value in table["properties"].items():
            if value not in keys.setdefault(key, []):
                keys[key].append(value)
    return {
        "description": "Keys of [prune] that all runs of a sweep share.",
        "type": "object",
        "properties": {
            key: found[0] if len(found) == 1 else {"anyOf": found} for key, found in keys.items()
        },
        "additionalProperties": False,
    }


class _TomlSchema(GenerateJsonSchema):
    """Schema generator that omits null, which TOML does not have."""

    def nullable_schema(self, schema: NullableSchema) -> Schema:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: WithDefaultSchema) -> Schema:
        if schema.get("default") is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)
