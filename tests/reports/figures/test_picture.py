"""Figures with their data as downloadable files."""

import csv
import json

from prunekit.reports.figures.picture import Picture, as_csv

ROWS = [{"name": 'a "b", c', "value": 0.5}, {"name": "ö\nd", "value": None}]


def test_csv_is_read_as_the_rows_it_was_written_from():
    lines = as_csv(ROWS).splitlines(keepends=True)
    read = list(csv.DictReader(lines))
    assert [row["name"] for row in read] == [row["name"] for row in ROWS]
    assert [row["value"] for row in read] == ["0.5", ""]


def test_no_rows_make_no_csv():
    assert as_csv([]) == ""


def test_a_picture_offers_its_rows_as_files_named_like_its_title():
    picture = Picture("Tokens/s written", None, "caption", ROWS)
    assert picture.file == "tokens-per-s-written"
    assert picture.csv == as_csv(ROWS)
    assert json.loads(picture.json) == ROWS
