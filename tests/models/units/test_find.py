"""Unit groups by kind: each has that kind, in execution order."""

import pytest

from prunekit.errors import ConfigError
from prunekit.models.units.find import check_current, unit_groups
from tests.support.adapters import PEFT_WARNS, adapted_model
from tests.support.architectures import tiny
from tests.support.units import DENSE_KINDS


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_the_groups_of_a_kind_have_that_kind(kind):
    model = tiny("llama")
    groups = unit_groups(model, kind)
    assert {group.kind for group in groups} == {kind}
    assert len(groups) == (1 if kind in ("blocks", "hidden") else 2)
    assert [group.name for group in groups] == sorted(group.name for group in groups)
    assert all(model.get_submodule(group.name) is not None for group in groups)


@pytest.mark.filterwarnings(*PEFT_WARNS)
@pytest.mark.parametrize("kind", [kind for kind in DENSE_KINDS if kind != "blocks"])
def test_groups_from_before_adapters_were_added_are_not_current(kind):
    base = tiny("llama")
    before, blocks = unit_groups(base, kind), unit_groups(base, "blocks")
    check_current(base, before)
    adapted_model("llama", base=base)
    check_current(base, blocks)  # they have whatever is in them
    with pytest.raises(ConfigError, match=rf"{kind}: adapters were added .*\.relocate\(\)"):
        check_current(base, before)
    check_current(base, unit_groups(base, kind))
