"""Parameter costs of units, counted from parameter shapes."""

from prunekit.models.units.find import unit_groups
from prunekit.models.units.heads_neurons import linear_groups
from tests.support.architectures import tiny


def test_counts_the_parameters_of_a_unit_from_its_shapes():
    """Closed-form counts of a head, a gated neuron and a group.

    A head has 4·d·d_h and three biases, a gated neuron 3·d, a group 2·g·d·d_h + 2·d·d_h.
    """
    assert linear_groups(tiny("bert"), "heads")[0].parameters_per_unit == 4 * 32 * 8 + 3 * 8
    assert linear_groups(tiny("bert"), "neurons")[0].parameters_per_unit == 2 * 32 + 1
    assert linear_groups(tiny("llama"), "neurons")[0].parameters_per_unit == 3 * 32
    assert (
        linear_groups(tiny("llama"), "heads")[0].parameters_per_unit == 2 * 2 * 32 * 8 + 2 * 32 * 8
    )


def test_widths_are_multiples_if_the_units_are():
    """Groups of two 8-feature query heads, single neurons, and whole blocks."""
    model = tiny("llama")
    assert linear_groups(model, "heads")[0].unit_multiple(32) == 4
    assert linear_groups(model, "neurons")[0].unit_multiple(32) == 32
    assert unit_groups(model, "blocks")[0].unit_multiple(32) == 1
    assert unit_groups(model, "hidden")[0].unit_multiple(3) == 12


def test_a_group_keeps_its_anchor_when_its_name_changes():
    model = tiny("llama")
    before = linear_groups(model, "heads")[1]
    del model.model.layers[0]
    (after,) = linear_groups(model, "heads")
    assert after.name != before.name
    assert after.anchor is before.anchor
