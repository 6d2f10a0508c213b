"""Error messages for users, from the validation errors of pydantic."""

from collections.abc import Iterable, Mapping
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from prunekit.config.plugin_field import PluginField
from prunekit.config.toml_source import quoted
from prunekit.formatting import did_you_mean

# First word of pydantic's error type → expected value.
TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text in quotes",
    "list": "a list",
    "model": "a table",
    "dict": "a table",
    "union": "a name, or a table with a name",
    "too": "long enough",
}
BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


class MisplacedError(ValueError):
    """Mistakes in keys of other tables than the one that is validated.

    Attributes:
        messages: Message of each key.
    """

    def __init__(self, messages: Mapping[tuple[str, ...], str]) -> None:
        super().__init__("\n".join(f"{'.'.join(key)}: {messages[key]}" for key in messages))
        self.messages = messages


def explain(error: ErrorDetails, key: str, fields: Mapping[str, FieldInfo]) -> str:
    """Return the message of one validation error.

    Args:
        error: Error details from pydantic.
        key: Name of the invalid or missing key.
        fields: Fields of its table, by key.
    """
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"no such key.{did_you_mean(key, fields) or _options(fields)}"
    if kind == "missing":
        described = (fields[key].description or "") if key in fields else ""
        return f"missing. {' '.join(described.split())}".strip()
    if kind == "literal_error":
        return _unknown_option(error["input"], "possible", _allowed_values(fields, key))
    if kind == "union_tag_invalid":
        return _unknown_option(context["tag"], _with_article(key), _plugins(fields, key))
    return _type_message(error)


def _type_message(error: ErrorDetails) -> str:
    kind, value, context = error["type"], quoted(error["input"]), error.get("ctx", {})
    if kind in BOUNDS:
        bound, words = BOUNDS[kind]
        return f"{value} is not possible: {words} {context[bound]:g}."
    if kind == "value_error":
        return str(context["error"])
    expected = TYPE_WORDS.get(kind.partition("_")[0])
    return f"{value} is not {expected}." if expected else f"{error['msg']}, not {value}."


def _unknown_option(word: object, noun: str, options: list[str]) -> str:
    return f"{quoted(word)} is not {noun}.{did_you_mean(word, options)}{_options(options)}"


def _options(options: Iterable[str]) -> str:
    return f" Choose: {', '.join(options)}."


def _allowed_values(fields: Mapping[str, FieldInfo], key: str) -> list[str]:
    """Return the values of a field, as TOML writes them."""
    found = _literals(fields[key].annotation) if key in fields else []
    return [str(each).lower() if isinstance(each, bool) else str(each) for each in found]


def _literals(annotation: object) -> list[object]:
    """Return the values of all literals in a type."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [*arguments]
    return [value for each in arguments for value in _literals(each)]


def _plugins(fields: Mapping[str, FieldInfo], key: str) -> list[str]:
    """Return the names of the classes that a field may hold."""
    annotated = fields[key].metadata if key in fields else []
    return [name for each in annotated if isinstance(each, PluginField) for name in each.classes()]


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
