"""Compressed checkpoints loaded and saved by transformers."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from prunekit.errors import CheckpointError
from prunekit.inference.convert import convert
from prunekit.inference.sparse_linear import SparseLinear
from tests.support import checkpoints
from tests.support.closeness import assert_close
from tests.support.fresh_process import run_script

KINDS = ["2:4", "bitmask"]
IDS = torch.arange(1, 17)[None]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("dtype", ["auto", torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_sparse_layers(sparse_folders, kind, dtype):
    sparse = AutoModelForCausalLM.from_pretrained(sparse_folders / kind, dtype=dtype)
    dense = AutoModelForCausalLM.from_pretrained(sparse_folders / "dense", dtype=dtype)
    layers = [module for module in sparse.modules() if isinstance(module, SparseLinear)]
    assert len(layers) == 14
    assert not any(hasattr(layer, "dense_weight") for layer in layers)
    exact = AutoModelForCausalLM.from_pretrained(sparse_folders / "dense", dtype=torch.float64)
    assert_close(logits(sparse), logits(exact), logits(dense))
    new = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(sparse.generate(IDS, **new), dense.generate(IDS, **new))


@pytest.mark.parametrize("kind", KINDS)
def test_saves_what_it_loaded(sparse_folders, kind, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(sparse_folders / kind)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    plain = again.dequantize()
    assert not any(isinstance(module, SparseLinear) for module in plain.modules())
    assert torch.equal(logits(plain), logits(model))


def test_loads_without_a_head(sparse_folders):
    model = AutoModel.from_pretrained(sparse_folders / "2:4")
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == 14


@pytest.mark.parametrize(
    ("linears", "message"),
    [
        (
            {"model.layers.0.mlp.up_proj": [64, 36, 1]},
            "is listed as compressed from a linear layer whose",
        ),
        ({"a.b": [64, 36, 1]}, "none of the 1 layers that it lists as compressed is in LlamaForC"),
    ],
)
def test_a_config_of_another_model_is_refused(sparse_folders, linears, message, tmp_path):
    folder = convert(sparse_folders / "dense", tmp_path / "out", "2:4").folder
    said = {"quant_method": "prunekit", "format": "2:4", "linears": linears}
    checkpoints.configure(folder, quantization_config=said)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


WITHOUT = """
import sys
sys.modules["prunekit"] = None  # as if it were not installed
import transformers
transformers.AutoModelForCausalLM.from_pretrained({folder!r})
print("loaded")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_without_prunekit_transformers_refuses(sparse_folders, kind):
    script = WITHOUT.format(folder=str(sparse_folders / kind))
    done = run_script(script, with_prunekit=False)
    assert done.returncode != 0
    assert "loaded" not in done.stdout
    assert "Unknown quantization type, got prunekit" in done.stderr
    assert "size mismatch" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("RuntimeError")
