"""Parameters of tests, of which some are for the tier ``soak`` alone."""

from collections.abc import Iterable
from typing import Any

import pytest

DISTINCT = {"bert", "gemma3_text", "gpt2", "gpt_neox", "llama", "phi3", "t5"}
"""Declared model types that differ in how they lay out linears, norms and positions.

Others are as one of them: distilbert and roberta as bert, opt as gpt2, the rest as llama.
"""


def often(values: Iterable[Any], chosen: Iterable[Any] = DISTINCT) -> list[Any]:
    """Return all values for ``parametrize``, those not chosen for the tier ``soak``.

    Args:
        values: Values of an argument, or tuples of those of several.
        chosen: Values that are tested in each run of all tests.
    """
    every, chosen = [*values], [*chosen]
    assert any(value in chosen for value in every)
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[] if value in chosen else [pytest.mark.soak],
        )
        for value in every
    ]
