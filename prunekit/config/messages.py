"""What pydantic finds, in the user's words: what was found, what is allowed, what to do."""

import difflib
from collections.abc import Iterable, Mapping

from pydantic_core import ErrorDetails

from prunekit.config.toml_source import shown

# The first word of pydantic's code → what was to be written.
KINDS = {
    "int": "a whole number",
    "float": "a number",
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


def explain(error: ErrorDetails, key: str, allowed: Mapping[str, str]) -> str:
    """Return one error as a sentence.

    Args:
        error: As pydantic lists it.
        key: The key that is wrong or missing.
        allowed: The keys of its section, with what each means.
    """
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"no such key.{did_you_mean(key, allowed) or _choose(allowed)}"
    if kind == "missing":
        return f"missing. {' '.join(allowed.get(key, '').split())}".strip()
    if kind == "literal_error":
        return _not(error["input"], "possible", _unquoted(context["expected"]))
    if kind == "union_tag_invalid":
        return _not(context["tag"], _a(key), _unquoted(context["expected_tags"]))
    return _by_type(error)


def did_you_mean(word: object, options: Iterable[str]) -> str:
    """Return a question with the option nearest to ``word``, or nothing if none is near."""
    near = difflib.get_close_matches(str(word), list(options), 1)
    return f' Did you mean "{near[0]}"?' if near else ""


def _by_type(error: ErrorDetails) -> str:
    kind, value, context = error["type"], shown(error["input"]), error.get("ctx", {})
    if kind in BOUNDS:
        bound, words = BOUNDS[kind]
        return f"{value} is not possible: {words} {context[bound]:g}."
    if kind == "value_error":
        return str(context["error"])
    expected = KINDS.get(kind.partition("_")[0])
    return f"{value} is not {expected}." if expected else f"{error['msg']}, not {value}."


def _not(word: object, noun: str, options: list[str]) -> str:
    return f"{shown(word)} is not {noun}.{did_you_mean(word, options)}{_choose(options)}"


def _choose(options: Iterable[str]) -> str:
    return f" Choose: {', '.join(options)}."


def _unquoted(words: str) -> list[str]:
    """Read the options in which pydantic puts them into words: ``'a', 'b' or 'c'``."""
    return words.replace("'", "").replace(" or ", ", ").split(", ")


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
