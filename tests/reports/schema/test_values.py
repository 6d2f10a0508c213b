"""Types of the values of a report."""

import pytest
from pydantic import TypeAdapter, ValidationError

from prunekit.reports.schema.values import (
    Answer,
    Count,
    FileName,
    Number,
    Part,
    check_unique,
    is_square,
)


class Table(Part):
    count: Count
    number: Number


@pytest.mark.parametrize("number", [0.5, 3, "inf", "-inf", "nan"])
def test_numbers_may_be_the_strings_that_json_lacks(number):
    assert Table(count=0, number=number).number == number


@pytest.mark.parametrize("number", ["0.5", "infinity", True, float("inf"), float("nan"), None])
def test_other_numbers_are_refused(number):
    with pytest.raises(ValidationError, match="number"):
        Table(count=0, number=number)


@pytest.mark.parametrize("count", [-1, True, 1.0, "1"])
def test_counts_are_integers_from_0(count):
    with pytest.raises(ValidationError, match="count"):
        Table(count=count, number=0.0)


def test_unknown_keys_are_kept():
    assert Table(count=1, number=0.0, other="x").model_dump()["other"] == "x"


@pytest.mark.parametrize("name", ["/etc/passwd", "../model.safetensors", "a/../../b"])
def test_a_file_outside_of_the_folder_is_refused(name):
    with pytest.raises(ValidationError, match="names a file outside of the folder"):
        TypeAdapter(FileName).validate_python(name)


def test_a_file_in_a_subfolder_is_accepted():
    assert TypeAdapter(FileName).validate_python("adapter/a.safetensors") == "adapter/a.safetensors"


def test_an_answer_fits_float32():
    answer = TypeAdapter(Answer)
    assert answer.validate_python(-3e38) == -3e38
    with pytest.raises(ValidationError):
        answer.validate_python(1e39)


def test_a_name_that_occurs_twice_is_refused():
    check_unique(["a", "b"])
    with pytest.raises(ValueError, match=r"^b is listed twice"):
        check_unique(["a", "b", "b"])


def test_a_square_has_as_many_columns_as_rows():
    assert is_square([], 0)
    assert is_square([[1, 2], [3, 4]], 2)
    assert not is_square([[1, 2], [3]], 2)
    assert not is_square([[1, 2], [3, 4]], 3)
