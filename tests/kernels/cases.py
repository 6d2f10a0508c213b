"""Cases of kernel tests, of which Triton's interpreter, which is slow, runs some in soak alone."""

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
from prunekit_kernels._triton import INTERPRETED

SELDOM = [pytest.mark.soak] if INTERPRETED else []
"""Marks of a case that takes the same paths as another one."""


def cases(*axes: Iterable[Any], seldom: Callable[..., bool]) -> list[Any]:
    """Return all combinations of values for ``parametrize``.

    Args:
        axes: The values of each argument.
        seldom: Returns of a combination whether it is interpreted in soak alone.
    """
    return [pytest.param(*case, marks=SELDOM if seldom(*case) else []) for case in product(*axes)]
