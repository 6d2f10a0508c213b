"""Heads and neurons: their exact rows and columns in each model family."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from prunekit.errors import CheckpointError
from prunekit.models.orientation import weight_matrix
from prunekit.models.units.heads_neurons import linear_groups
from tests.support.architectures import TINY, tiny

GROUPED = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_finds_the_heads_of_each_attention_and_the_neurons_of_each_feed_forward(model_type):
    model = tiny(model_type)
    heads, neurons = linear_groups(model, "heads"), linear_groups(model, "neurons")
    blocks = {"gemma3_text": 3, "t5": 2 + 3}.get(model_type, 2)
    assert len(neurons) == blocks
    assert len(heads) == blocks + 3 * (model_type == "t5")  # cross-attention
    units, span = (2, 16) if model_type in GROUPED else (4, 8)
    assert {(site.units, site.features_per_unit) for site in heads} == {(units, span)}
    assert {(site.units, site.features_per_unit) for site in neurons} == {
        (128 if model_type == "gpt2" else 64, 1)
    }
    modules = dict(model.named_modules())
    assert all(modules[site.name] is site.module for site in heads + neurons)


@pytest.mark.parametrize("model_type", sorted(TINY))
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_each_row_and_column_belongs_to_one_unit(model_type, kind):
    for site in linear_groups(tiny(model_type), kind):
        assert (
            site.owner.tolist()
            == torch.arange(site.units).repeat_interleave(site.features_per_unit).tolist()
        )
        for linear in {part.linear for part in site.writers}:
            rows = [part.index.flatten() for part in site.writers if part.linear is linear]
            assert torch.cat(rows).sort().values.tolist() == [*range(len(weight_matrix(linear)))]


def test_queries_keys_and_values_of_gpt2_are_columns_of_its_inputs_first_matrix():
    """Head h starts at column h·d of each query, key, value third."""
    site = linear_groups(tiny("gpt2"), "heads")[0]
    query, key, value = site.writers
    assert isinstance(query.linear, Conv1D)
    assert query.linear.weight.shape == (32, 96)
    assert query.index[1].flatten().tolist() == [*range(8, 16)]
    assert key.index[1].flatten().tolist() == [*range(40, 48)]
    assert value.index[1].flatten().tolist() == [*range(72, 80)]


def test_query_key_and_value_of_gpt_neox_follow_each_other_in_each_head():
    query, key, value = linear_groups(tiny("gpt_neox"), "heads")[0].writers
    assert query.index[1].flatten().tolist() == [*range(24, 32)]
    assert key.index[1].flatten().tolist() == [*range(32, 40)]
    assert value.index[1].flatten().tolist() == [*range(40, 48)]


def test_a_unit_under_grouped_queries_is_a_key_head_with_its_query_heads():
    site = linear_groups(tiny("phi3"), "heads")[0]
    query, key, value = site.writers
    assert query.index[1].tolist() == [[*range(16, 24)], [*range(24, 32)]]
    assert key.index[1].tolist() == [[*range(40, 48)]]
    assert value.index[1].tolist() == [[*range(56, 64)]]
    assert site.reader.index[1].flatten().tolist() == [*range(16, 32)]


def test_refuses_a_family_that_does_not_say_where_its_heads_are():
    """An unknown architecture is an error, never a silently unchanged model."""
    with pytest.raises(CheckpointError, match="'bloom' keep their heads, so none can be removed"):
        linear_groups(tiny("bloom"), "heads")
