"""Generation speed of whole models: shapes, decoders, error cases."""

import pytest
import torch
import transformers

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import ConfigError
from prunekit.inference.model_speed import (
    _DynamicCacheDecoder,
    _StaticCacheDecoder,
    compare_models,
    compressible_shapes,
)
from tests.support import checkpoints

CPU = torch.device("cpu")


def test_the_static_cache_decodes_the_same_tokens_as_the_growing_one():
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = (torch.arange(6) * 7919 % 97)[None]

    def called_before(step):
        step()
        return step

    with torch.inference_mode():
        decoders = [
            _DynamicCacheDecoder(model, ids, 9),
            _StaticCacheDecoder(model, ids, 9, called_before),
        ]
        for decoder in decoders:
            for _ in range(2):  # the second call must not depend on state of the first
                decoder.prefill()
                decoder.decode()
    growing, fixed = (torch.cat(decoder.tokens).flatten().tolist() for decoder in decoders)
    assert growing == fixed
    assert len(set(growing)) > 1


@pytest.mark.parametrize("kind", ["dense", "2:4", "bitmask"])
def test_shapes_are_those_of_the_pruned_linears_in_every_format(sparse_folders, kind):
    assert compressible_shapes(str(sparse_folders / kind)) == [
        *((16, 32), (32, 32), (32, 64), (64, 32))
    ]
    assert compressible_shapes(str(sparse_folders / "m")) == []


def test_both_models_are_measured_with_the_same_tokens(sparse_folders, monkeypatch):
    monkeypatch.setattr("prunekit.inference.model_speed.RUNS", 1)
    dense, sparse = compare_models(str(sparse_folders / "bitmask"), CPU, prompt=1000, new=4)
    limit = open_checkpoint(sparse_folders / "bitmask").config["max_position_embeddings"]
    assert dense["prompt"] == sparse["prompt"] == limit - 4
    assert (dense["layers"], sparse["layers"], sparse["count"]) == ("dense", "2:4", 14)
    assert sparse["resident_bytes"] < dense["resident_bytes"]
    assert not dense["cuda_graph"]
    assert min(dense["decode_tokens_per_second"], sparse["prefill_tokens_per_second"]) > 0


def test_models_that_do_not_generate_or_are_not_sparse_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="BertForMaskedLM does not generate text"):
        compare_models(str(checkpoints.write(tmp_path / "b", "bert")), CPU, 4, 4)
    with pytest.raises(ConfigError, match="none of its linear layers has enough zeros"):
        compare_models(str(checkpoints.write(tmp_path / "m")), CPU, 4, 4)
