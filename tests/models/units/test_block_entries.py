"""Config entries that list blocks, for the kept blocks."""

from prunekit.architectures import Stack
from prunekit.models.units.block_entries import entries_of_kept, new_number

STACK = Stack("layers", ())


def test_lists_letters_and_numbers_of_blocks_follow_the_kept_ones():
    config = {
        "layer_types": ["conv", "full", "conv", "full"],
        "hybrid_override_pattern": "M*M-",
        "attn_layer_indices": [1, 3],
        "mlp_only_layers": [],
        "eos_token_id": [1, 2, 3, 4],
        "no_rope_layers": None,
    }
    assert entries_of_kept(config, STACK, [1, 3], 4) == {
        "layer_types": ["full", "full"],
        "hybrid_override_pattern": "*-",
        "attn_layer_indices": [0, 1],
        "mlp_only_layers": [],
    }
    assert entries_of_kept(config, STACK, [0, 2], 4)["attn_layer_indices"] == []


def test_blocks_for_multi_token_prediction_follow_those_that_stay():
    config = {"layer_types": ["a", "b", "c", "mtp"], "moe_layers": [2, 3]}
    found = entries_of_kept(config, STACK, [0, 2], 3)
    assert found == {"layer_types": ["a", "c", "mtp"], "moe_layers": [1, 2]}
    assert [new_number(unit, [0, 2], 3) for unit in range(5)] == [0, None, 1, 2, 3]


def test_entries_of_another_kind_are_left_alone():
    config = {"layer_types": ["a"], "moe_layers": "1,2", "full_attn_idxs": [0.5]}
    assert entries_of_kept(config, STACK, [0, 2], 3) == {}


def test_entries_of_single_blocks_are_renumbered_with_them():
    config = {"per_layer_config": {"0": {"a": 1}, "3": {"b": 2}}}
    found = entries_of_kept(config, STACK, [1, 3], 4)
    assert found == {"per_layer_config": {"1": {"b": 2}}}
    numbers = entries_of_kept({"per_layer_config": {3: "b"}}, STACK, [1, 3], 4)
    assert numbers == {"per_layer_config": {1: "b"}}
