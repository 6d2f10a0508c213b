"""Config entries for the heads and neurons of blocks."""

import pytest

from prunekit.errors import ShapeError
from prunekit.models.units import linear_config
from prunekit.models.units.heads_neurons import linear_groups
from tests.support.architectures import tiny


def test_the_sizes_of_an_attention_follow_from_its_key_heads():
    """Two key heads, each with two query heads of 8 features."""
    group = linear_groups(tiny("llama"), "heads")[0]
    assert linear_config.head_counts(group, 1) == {"heads": 2, "groups": 1, "size": 8, "width": 16}
    entries = linear_config.config_entries(group, 1, "llama")
    assert entries["num_attention_heads"] == 2
    assert entries["num_key_value_heads"] == 1


def test_a_model_of_another_shape_is_refused():
    groups = linear_groups(tiny("llama"), "neurons")
    whole, fewer = ({group.name: range(count) for group in groups} for count in (64, 63))
    linear_config.check_same_shape(groups, groups, whole, {})
    with pytest.raises(ShapeError, match=r"makes 64 neurons of 1 features, not 63 of 1"):
        linear_config.check_same_shape(groups, groups, fewer, {"intermediate_size": 63})


def test_an_entry_that_changes_something_else_too_is_refused():
    """The neurons of the shared expert have the entry of the experts' width."""
    usual, fewer = tiny("deepseek_v3"), tiny("deepseek_v3", moe_intermediate_size=8)
    groups = linear_groups(usual, "neurons")
    linear_config.check_same_rest(usual, usual, groups, {})
    with pytest.raises(ShapeError, match=r"moe_intermediate_size = 8 also changes .*experts"):
        linear_config.check_same_rest(usual, fewer, groups, {"moe_intermediate_size": 8})
    narrow = tiny("deepseek_v3", intermediate_size=40)
    linear_config.check_same_rest(usual, narrow, groups, {"intermediate_size": 40})


def test_groups_are_counted_by_their_entry():
    groups = linear_groups(tiny("deepseek_v3"), "neurons")
    counts = [{group.units for group in alike} for alike in linear_config.by_entry(groups)]
    assert all(len(each) == 1 for each in counts)
    assert len(counts) == 2
    (heads,) = linear_config.by_entry(linear_groups(tiny("llama"), "heads"))
    assert len(heads) == 2


def test_different_numbers_have_no_common_count():
    groups = linear_groups(tiny("llama"), "neurons")
    kept = {group.name: range(index + 1) for index, group in enumerate(groups)}
    with pytest.raises(ShapeError, match="keep from 1 to 2"):
        linear_config.common_count(groups, kept, "llama")


def test_head_counts_are_set_in_a_config_of_the_attention_alone():
    """Other attention modules share the config; their counts must not change."""
    model = tiny("gpt2")
    first, second = linear_groups(model, "heads")
    linear_config.set_head_counts(first, first.declared, 3)
    assert first.module.num_heads == 3
    assert second.module.num_heads == 4
