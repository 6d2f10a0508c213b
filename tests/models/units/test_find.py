"""Unit groups by kind: each has that kind, in execution order."""

import pytest

from prunekit.models.units.find import unit_groups
from prunekit.models.units.kinds import KINDS
from tests.support.architectures import tiny


@pytest.mark.parametrize("kind", KINDS)
def test_the_groups_of_a_kind_have_that_kind(kind):
    model = tiny("llama")
    groups = unit_groups(model, kind)
    assert {group.kind for group in groups} == {kind}
    assert len(groups) == (1 if kind in ("blocks", "hidden") else 2)
    assert [group.name for group in groups] == sorted(group.name for group in groups)
    assert all(model.get_submodule(group.name) is not None for group in groups)
