"""Validation errors of pydantic become messages for users."""

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunekit.config.messages import explain
from prunekit.formatting import did_you_mean


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid")

    samples: Annotated[int, Field(ge=1)] = 1
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.5
    dtype: Literal["auto", "float32"] = "auto"
    names: list[str] = []
    keep: bool = True
    permute: Literal[False, True, "residual"] | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": "many"}, '"many" is not a whole number.'),
        ({"samples": 0}, "0 is not possible: at least 1."),
        ({"rate": 0.0}, "0.0 is not possible: more than 0."),
        ({"rate": 1.0}, "1.0 is not possible: less than 1."),
        ({"names": 3}, "3 is not a list."),
        ({"keep": "yes"}, '"yes" is not true or false.'),
        ({"dtype": "flot32"}, '"flot32" is not possible. Did you mean "float32"? '
                              "Choose: auto, float32."),
        ({"permute": "x"}, '"x" is not possible. Choose: false, true, residual.'),
        ({"sample": 3}, 'no such key. Did you mean "samples"?'),
        ({"xyz": 3}, "no such key. Choose: samples, rate, dtype, names, keep, permute."),
    ],
)  # fmt: skip
def test_the_message_has_what_was_found_and_what_is_allowed(values, message):
    with pytest.raises(ValidationError) as caught:
        Table.model_validate(values, strict=True)
    (error,) = caught.value.errors()
    assert explain(error, str(error["loc"][-1]), Table.model_fields) == message


def test_a_suggestion_is_made_only_for_similar_words():
    assert did_you_mean("wander", ["wanda", "magnitude"]) == ' Did you mean "wanda"?'
    assert did_you_mean("taylor", ["wanda", "magnitude"]) == ""
