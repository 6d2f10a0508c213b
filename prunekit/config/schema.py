"""JSON schema of a config file."""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core.core_schema import NullableSchema, WithDefaultSchema

from prunekit.config.run_config import Config, StructuredConfig
from prunekit.config.sweep_table import Sweep
from prunekit.models.units.kinds import KINDS


def schema() -> dict[str, Any]:
    """Return the JSON schema of configs, for completion in editors."""
    made, units = (
        kind.model_json_schema(schema_generator=_TomlSchema) for kind in (Config, StructuredConfig)
    )
    for table in made["$defs"]["Prune"]["oneOf"]:
        table["properties"]["pattern"]["not"] = {"enum": [*KINDS]}
    made["$defs"] = units["$defs"] | made["$defs"]
    prune = made["properties"]["prune"]
    made["properties"]["prune"] = {
        "description": prune.pop("description"),
        "oneOf": [prune, {"$ref": "#/$defs/StructuredPrune"}],
    }
    made["properties"]["sweep"] = Sweep.model_json_schema(schema_generator=_TomlSchema)
    return made


class _TomlSchema(GenerateJsonSchema):
    """Schema generator that omits null, which TOML does not have."""

    def nullable_schema(self, schema: NullableSchema) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: WithDefaultSchema) -> dict[str, Any]:
        if schema.get("default") is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)
