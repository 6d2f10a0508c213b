"""Config field for a plug-in class, chosen by name, with its settings."""

from collections.abc import Callable
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema


class PluginField:
    """Annotation of a field that holds an instance of a plug-in class.

    In TOML the value is the name of the class, or a table with ``name`` and the settings of the
    class. An instance of such a class is accepted unchanged.

    Attributes:
        classes: Returns the classes by name.
    """

    def __init__(self, classes: Callable[[], dict[str, type[Any]]]) -> None:
        self.classes = classes

    def __get_pydantic_core_schema__(self, _: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        before = core_schema.no_info_before_validator_function
        choices: dict[Any, CoreSchema] = {
            name: before(_without_name, handler.generate_schema(kind))
            for name, kind in self.classes().items()
        }
        return before(_as_table, core_schema.tagged_union_schema(choices, discriminator="name"))

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        names = {"type": "string", "enum": [*self.classes()]}
        return {"anyOf": [names, *self.table_schemas("name", handler)]}

    def table_schemas(self, tag: str, handler: GetJsonSchemaHandler) -> list[dict[str, Any]]:
        """Return each class's table as JSON schema, named by the key ``tag``."""
        return [_table_schema(tag, name, kind, handler) for name, kind in self.classes().items()]


def summary(kind: type[Any]) -> str:
    """Return the first line of the docstring of a class."""
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _as_table(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _without_name(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {key: setting for key, setting in value.items() if key != "name"}


def _table_schema(
    tag: str, name: str, kind: type[Any], handler: GetJsonSchemaHandler
) -> dict[str, Any]:
    schema = handler.resolve_ref_schema(handler(kind.__pydantic_core_schema__))
    chosen = {"type": "string", "const": name, "description": summary(kind)}
    return {
        "title": name,
        "type": "object",
        "properties": {tag: chosen, **schema.get("properties", {})},
        "required": [tag, *schema.get("required", [])],
        "additionalProperties": False,
    }
