"""Names of tensors after blocks were removed, in a model and in files of any naming."""

import pytest

from prunekit.errors import ShapeError
from prunekit.models.units.block_names import Source, tensor_sources
from prunekit.models.units.blocks import block_groups
from tests.support.architectures import tiny

KEPT = {"model.layers": [0, 2]}


@pytest.fixture(scope="module")
def groups():
    return block_groups(tiny("llama", num_hidden_layers=3))


def block_names(groups):
    (group,) = groups
    return [
        f"{group.name}.{unit}.{path}"
        for unit, block in enumerate(group.blocks)
        for path, _ in block.named_parameters()
    ]


@pytest.mark.parametrize("prefix", ["model.layers.", "layers.", "transformer.7.h."])
def test_kept_blocks_are_renumbered_whatever_precedes_their_number(groups, prefix):
    stored = {name: name.replace("model.layers.", prefix) for name in block_names(groups)}
    stored["lm_head.weight"] = "head.3.weight"
    found = tensor_sources(groups, KEPT, stored, stored.values())
    assert len(found) == 2 * len(block_names(groups)) // 3 + 1
    for place, unit in enumerate(KEPT["model.layers"]):
        own = f"model.layers.{place}.mlp.up_proj.weight"
        source = Source(f"{prefix}{unit}.mlp.up_proj.weight", own)
        assert found[f"{prefix}{place}.mlp.up_proj.weight"] == source
    assert found["head.3.weight"] == Source("head.3.weight", "lm_head.weight")


def test_numbers_of_experts_are_not_those_of_blocks(groups):
    stored = {
        f"model.layers.{block}.experts.{expert}.up": f"b.{block}.e.{expert}.up"
        for block in range(3)
        for expert in range(4)
    }
    found = tensor_sources(groups, KEPT, stored, stored.values())
    assert len(found) == 8
    assert found["b.1.e.2.up"] == Source("b.2.e.2.up", "model.layers.1.experts.2.up")


def test_tensors_of_no_module_stay_except_those_of_removed_blocks(groups):
    stored = {name: name for name in block_names(groups)}
    unused = ["model.layers.1.mask", "model.layers.2.mask", "model.layers.3.eh", "mtp.layers.1.up"]
    found = tensor_sources(groups, KEPT, stored, [*stored, *unused])
    kept = {name: source.stored for name, source in found.items() if source.name is None}
    assert kept == {
        "model.layers.1.mask": "model.layers.2.mask",
        "model.layers.2.eh": "model.layers.3.eh",
        "mtp.layers.1.up": "mtp.layers.1.up",
    }
    whole = tensor_sources([], {}, stored, [*stored, *unused])
    assert {name: source.stored for name, source in whole.items()} == {
        name: name for name in [*stored, *unused]
    }


def test_names_without_the_number_of_the_block_are_refused(groups):
    stored = {name: name.replace("layers.", "layer_") for name in block_names(groups)}
    with pytest.raises(ShapeError, match="does not hold the number of its block"):
        tensor_sources(groups, KEPT, stored, stored.values())


def test_a_position_bias_stays_with_the_first_block():
    groups = block_groups(tiny("t5", num_layers=3))
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    stored = {bias: bias} | {
        name: name
        for unit in range(3)
        for name in [f"encoder.block.{unit}.layer.0.SelfAttention.q.weight"]
    }
    kept = {groups[0].name: [1, 2], groups[1].name: [0, 1, 2]}
    found = tensor_sources(groups, kept, stored, stored)
    assert found.keys() == stored.keys() - {"encoder.block.2.layer.0.SelfAttention.q.weight"}
    assert found[bias] == Source(bias, bias)
