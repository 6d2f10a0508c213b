"""Shapes that a stock config cannot describe are refused with the reason."""

import pytest

from prunekit.errors import ShapeError
from prunekit.models.units.blocks import block_groups
from prunekit.models.units.heads_neurons import linear_groups
from prunekit.models.units.stock_config import fixed_blocks, stock_entries
from tests.support.units import random_kept, randomized_model

CANNOT_SAY = ("bert", "distilbert", "gpt2", "gpt_neox", "opt", "roberta")


@pytest.mark.parametrize("model_type", CANNOT_SAY)
def test_a_config_that_cannot_say_fewer_heads_is_refused_with_the_reason(model_type):
    model = randomized_model(model_type)
    found = linear_groups(model, "heads")
    with pytest.raises(
        ShapeError, match=f"{model_type}.*hidden size divided by the number of heads"
    ):
        stock_entries(model, found, random_kept(model, "heads", uniform=True))


def test_a_stock_config_is_refused_for_unequal_blocks_and_for_heads_that_differ_under_one_bias():
    model = randomized_model("llama")
    with pytest.raises(ShapeError, match=r'keep from 32 to 33.*Choose scope = "layer"'):
        stock_entries(
            model, linear_groups(model, "neurons"), random_kept(model, "neurons", uniform=False)
        )
    model = randomized_model("t5")
    kept = random_kept(model, "heads", uniform=True)
    kept["encoder.block.1.layer.0.SelfAttention"] = [0, 1]
    kept["encoder.block.0.layer.0.SelfAttention"] = [1, 2]
    with pytest.raises(ShapeError, match="share one position bias"):
        stock_entries(model, linear_groups(model, "heads"), kept)


def test_a_stock_config_is_refused_where_transformers_itself_refuses_it():
    """Llama requires a hidden size divisible by the head count, despite ``head_dim``."""
    model = randomized_model("llama", num_key_value_heads=4)
    kept = {site.name: [0, 1, 2] for site in linear_groups(model, "heads")}
    with pytest.raises(ShapeError, match=r"num_attention_heads = 3.*not a multiple"):
        stock_entries(model, linear_groups(model, "heads"), kept)


def test_blocks_that_no_config_can_leave_out_are_found_before_any_is_ranked():
    """ModernBERT's first block has no norm; DiffLlama's blocks depend on their place."""
    for model_type, fixed in {"modernbert": {"layers": [0]}, "gemma3_text": {}, "t5": {}}.items():
        depth = "num_layers" if model_type == "t5" else "num_hidden_layers"
        model = randomized_model(model_type, **{depth: 3})
        found = fixed_blocks(model, block_groups(model))
        assert {name.removeprefix("model."): units for name, units in found.items()} == fixed
    model = randomized_model("gpt2", n_layer=3, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ShapeError, match="scaling is"):
        fixed_blocks(model, block_groups(model))
