"""Uniform: the same sparsity for every layer."""

import pytest

from prunekit.allocations.uniform import Uniform


def test_uniform_gives_all_the_same_and_looks_at_nothing():
    found = Uniform().allocate({"a": 3, "b": 9}, lambda: pytest.fail("surveyed"), 0.3)
    assert found == {"a": 0.3, "b": 0.3}
    assert not Uniform.surveys
    assert not Uniform.needs
