"""Heat maps of matrices."""

import re

from prunekit.reports.figures.matrix import Matrix, picture

VALUES = [[1.0, None], [0.25, 0.5]]


def test_every_known_value_is_drawn_with_its_labels():
    matrix = Matrix("attention", VALUES, ("query", "key"), ["a", "b"], ["x", "y"], "from")
    made = picture("Title", matrix, "caption", "salt")
    assert made.svg is not None
    assert re.findall("<title>([^<]*)", made.svg) == ["a → x: 1.00", "b → x: 0.250", "b → y: 0.500"]
    assert made.alt == "Heat map, query by key"


def test_data_of_an_unnamed_matrix_counts_rows_and_columns():
    matrix = Matrix("attention", VALUES, ("query", "key"), ["a", "a"], ["x", "y"], "from")
    rows = picture("Title", matrix, "caption", "salt").rows
    assert list(rows) == [
        {"query": 0, "key": 0, "attention": 1.0},
        {"query": 1, "key": 0, "attention": 0.25},
        {"query": 1, "key": 1, "attention": 0.5},
    ]


def test_data_of_a_named_matrix_has_the_labels():
    square = Matrix("ρ", VALUES, ("one", "other"), ["a", "b"], ["a", "b"], "", named=True)
    assert picture("Title", square, "", "salt").rows[1] == {"one": "b", "other": "a", "ρ": 0.25}
    wide = Matrix("norm", VALUES, ("head", "token"), ["a", "b"], ["x", "y"], "", named=True)
    assert picture("Title", wide, "", "salt").rows[1] == {"head": "b", "token": 0, "norm": 0.25}


def test_ids_differ_by_salt():
    matrix = Matrix("attention", VALUES, ("query", "key"), ["a", "b"], ["x", "y"], "from")
    ids = [
        set(re.findall(r' id="([^"]+)"', picture("Title", matrix, "", salt).svg or ""))
        for salt in ("one", "two")
    ]
    assert ids[0]
    assert not ids[0] & ids[1]
