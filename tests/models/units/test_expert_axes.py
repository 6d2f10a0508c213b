"""Everything in a model that grows with the number of its experts, and nothing else."""

import pytest

from prunekit.errors import ShapeError
from prunekit.models.units.expert_axes import expert_count
from tests.support.architectures import tiny


def test_tensors_and_numbers_that_grow_with_the_experts_are_found_without_a_declaration():
    found = expert_count(tiny("deepseek_v3"), ["model.layers.1.mlp.experts"], 4)
    gate = "model.layers.1.mlp.gate"
    assert found.entry == ("n_routed_experts",)
    assert found.axes == {f"{gate}.weight": 0, f"{gate}.e_score_correction_bias": 0}
    assert (gate, "num_experts") in found.numbers


def test_a_number_in_a_config_inside_of_the_config_is_found_and_set():
    model = tiny("dbrx")
    found = expert_count(model, [f"transformer.blocks.{block}.ffn.experts" for block in (0, 1)], 4)
    assert found.entry == ("ffn_config", "moe_num_experts")
    entries = found.entries(model.config, 3)
    assert entries["ffn_config"]["moe_num_experts"] == 3
    assert entries["ffn_config"]["moe_top_k"] == 2
    found.apply(model, 3)
    assert model.config.ffn_config.moe_num_experts == 3
    assert all(getattr(model.get_submodule(path), name) == 3 for path, name in found.numbers)


def test_a_model_without_such_an_entry_is_refused():
    with pytest.raises(ShapeError, match=r"no single entry of a config of type 'mixtral'.*, 5,"):
        expert_count(tiny("mixtral"), ["model.layers.0.mlp.experts"], 5)
