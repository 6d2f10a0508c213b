"""Error messages for users, from the validation errors of pydantic."""

from collections.abc import Iterable, Mapping

from pydantic_core import ErrorDetails

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


def explain(error: ErrorDetails, key: str, allowed: Mapping[str, str]) -> str:
    """Return the message of one validation error.

    Args:
        error: Error details from pydantic.
        key: Name of the invalid or missing key.
        allowed: Keys of its table, with their descriptions.
    """
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"no such key.{did_you_mean(key, allowed) or _options(allowed)}"
    if kind == "missing":
        return f"missing. {' '.join(allowed.get(key, '').split())}".strip()
    if kind == "literal_error":
        return _unknown_option(error["input"], "possible", _parse_options(context["expected"]))
    if kind == "union_tag_invalid":
        return _unknown_option(
            context["tag"], _with_article(key), _parse_options(context["expected_tags"])
        )
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


def _parse_options(words: str) -> list[str]:
    """Parse pydantic's list of options: ``'a', 'b' or 'c'``; TOML has false and true."""
    options = words.replace("'", "").replace(" or ", ", ").split(", ")
    return [each.lower() if each in {"False", "True"} else each for each in options]


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
