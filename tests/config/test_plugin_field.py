"""A plug-in field takes a name or a table."""

import pytest

from prunekit.allocations.owl import Owl
from tests.support.configs import GOOD


@pytest.mark.parametrize(
    "value", ['{ name = "owl", spread = 0.1 }', '{ spread = 0.1, name = "owl" }']
)
def test_an_allocation_is_a_name_or_a_table(load, value):
    assert load(GOOD, "prune.allocation=owl").prune.allocation == Owl()
    assert load(GOOD, f"prune.allocation={value}").prune.allocation == Owl(spread=0.1)
