"""The set of built-in allocations."""

from prunekit.allocations import allocations
from prunekit.allocations.curves import Curves
from prunekit.allocations.global_ import Global
from prunekit.allocations.owl import Owl
from prunekit.allocations.uniform import Uniform


def test_the_allocations_are_all_here():
    assert set(allocations().values()) == {Curves, Global, Owl, Uniform}
