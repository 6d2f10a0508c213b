"""Config tables in which the settings of a plug-in are written flat."""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, GetJsonSchemaHandler

from prunekit.config.plugin_field import PluginField


def nest_method_settings(
    values: object,
    table_keys: Collection[str],
    classes: Mapping[str, type[BaseModel]],
    default: str | None = None,
) -> object:
    """Nest the settings of the method, written flat, under the key ``method``.

    Args:
        values: The table as read from TOML.
        table_keys: Keys of the table itself; all others are settings of the method.
        classes: Method classes by name.
        default: Name of the method that is meant where none is given.
    """
    if not isinstance(values, dict):
        return values
    own = {key: value for key, value in values.items() if key in table_keys}
    settings = {key: value for key, value in values.items() if key not in table_keys}
    name = values.get("method", default)
    if isinstance(name, str) and name in classes:
        return {**own, "method": {"name": name, **settings}}
    # The method is missing or unknown: report only keys that are no setting of any method.
    known = {setting for kind in classes.values() for setting in kind.model_fields}
    return own | {key: value for key, value in settings.items() if key not in known}


def flattened_schema(
    section: type[BaseModel],
    methods: PluginField,
    own: dict[str, Any],
    handler: GetJsonSchemaHandler,
) -> dict[str, Any]:
    """Return the JSON schema of a table, with the method's settings flat.

    Args:
        section: Class of the table.
        methods: Field of the method.
        own: JSON schema of the table's own keys.
        handler: Schema handler of pydantic.
    """
    tables = methods.table_schemas("method", handler)
    for table in tables:
        table["properties"] = {**own["properties"], **table["properties"]}
        needed = own.get("required", [])
        table["required"] = [*needed, *table["required"][1:]]
    return {"description": section.__doc__, "oneOf": tables}
