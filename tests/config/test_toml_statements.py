"""Statements and their lines, against parsing one more line at a time; limits; linear time."""

import time
import tomllib
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.config.toml_source import TomlSource
from prunekit.config.toml_statements import NESTING_LIMIT, NestingError, statements
from prunekit.errors import ConfigError

PIECES = [
    *("a", "b.c", '"x.["', "'z'", "=", " = ", "1.5", '"s\\"["', '""', "''", "\\", '"', "'", "."),
    *('"""', "'''", '"""\n[x]\\""" ""y"""""', "'''\n[m]\n'' # '''''", '"""\\\n a"""', '""""""'),
    *("[", "]", "{", "}", ",", "\n", "# c [ \"'\n", "[t]\n", "[t.u]\n", "[[v]]\n", "k = 1\n"),
    *("k=[\n1, # ]\n'2']\n", "i={a=1,b.c=[1]}\n", "1979-05-27T07:32:00.5Z", "true", " "),
]


def smallest_parsed(text):
    """Return each statement by its definition: the fewest lines that are TOML."""
    statement, first = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        try:
            tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        if statement.strip():
            yield first, statement.strip()
        statement, first = "", number + 1


@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_statements_are_the_fewest_lines_that_are_toml(text):
    found = [*statements(text)]
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    assert found == [*smallest_parsed(text)]


@pytest.mark.parametrize("opening", ["[", "{a=", "a.", "[[", "{a.b = ["])
def test_nesting_is_limited_where_it_is_found(opening):
    with pytest.raises(NestingError) as caught:
        [*statements(f"x = 1\ny = [\n{opening * NESTING_LIMIT}")]
    assert caught.value.line == 3
    assert [*statements(f"a{'.a' * (NESTING_LIMIT - 2)} = [1.5, 1.5]\n" * 3)]


LONG = 50_000
ADVERSE = {
    "an array of many lines": "a = [\n" + "1,\n" * LONG + "]",
    "an array on one line": "a = [" + "1," * LONG + "]",
    "a deep key": "a" + ".a" * LONG + " = 1",
    "brackets": "a = " + "[" * LONG,
    "a long string that does not end": 'a = """' + '\n\\"""' * LONG,
    "quotes": 'a = """' + '"' * LONG,
    "backslashes": 'a = "' + "\\" * LONG,
    "comments": "#\n" * LONG,
}


@pytest.mark.parametrize("name", ADVERSE)
def test_the_time_is_linear(name):
    def seconds(text):
        before = time.process_time()
        with suppress(ConfigError):
            TomlSource("config.toml", text)
        return time.process_time() - before

    # Parsing one more line at a time takes minutes.
    assert seconds(ADVERSE[name]) < 5
