"""Rows of .csv and .tsv files; the other readers are tested with the sources of text."""

import re

import pytest

from prunekit.data.rows import table_rows
from prunekit.errors import ConfigError


def rows(file, text, choose=list):
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(table_rows(str(file), choose))


def test_a_quote_is_a_character_of_a_tsv_and_quotes_a_cell_of_a_csv(tmp_path):
    tsv, csv = tmp_path / "a.tsv", tmp_path / "a.csv"
    assert rows(tsv, 'a\tb\n"so he says\t1\n\nx"\t\n') == [
        (f"{tsv}:2", {"a": '"so he says', "b": "1"}),
        (f"{tsv}:4", {"a": 'x"', "b": ""}),
    ]
    assert rows(csv, 'a,b\r\n"two\r\nlines, one ""cell""",1\r\nx,y\r\n') == [
        (f"{csv}:2", {"a": 'two\r\nlines, one "cell"', "b": "1"}),
        (f"{csv}:4", {"a": "x", "b": "y"}),
    ]


def test_only_chosen_columns_are_read_and_a_byte_order_mark_is_none(tmp_path):
    file = tmp_path / "a.tsv"
    seen = []
    found = rows(file, "\ufeffa\tb\n1\t2\n", lambda names: seen.append(names) or ["b"])
    assert (seen, found) == ([["a", "b"]], [(f"{file}:2", {"b": "2"})])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "a\tb\n1\n", "{}:2: 1 cells, and the first line names 2 columns"),
        ("a.tsv", b"a\n\xff\n", "{}: not UTF-8"),
        ("a.csv", 'a\n"x"y\n', "{}:2: not a row of a .csv file"),
        ("a.csv", 'a\n"x\n', "{}:2: not a row of a .csv file"),
        ("a.tsv", "a\n" + "x" * 200_000 + "\n", "{}:2: not a row of a .tsv file: field larger"),
    ],
)
def test_what_is_no_table_is_refused_with_its_line(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=re.escape(message.format(tmp_path / name))):
        rows(tmp_path / name, text)
