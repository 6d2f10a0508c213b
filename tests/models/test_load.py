"""Loading a model folder into memory."""

import json

import pytest
import torch

import prunekit
from prunekit.errors import CheckpointError
from tests.support import checkpoints
from tests.support.architectures import tiny
from tests.support.units import randomized_model


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "t5"])
def test_a_loaded_model_has_the_stored_weights(tmp_path, model_type):
    model = tiny(model_type)
    model.save_pretrained(tmp_path)
    loaded = prunekit.load(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_the_dtype_is_that_of_the_config_unless_another_is_asked_for(tmp_path):
    folder = checkpoints.write(tmp_path, dtype=torch.bfloat16)
    assert prunekit.load(folder).dtype == torch.bfloat16
    assert prunekit.load(folder, dtype=torch.float32).dtype == torch.float32


def test_load_refuses_a_class_that_transformers_does_not_have(tmp_path):
    randomized_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["MyModel"]}))
    with pytest.raises(CheckpointError, match=r"config.json: transformers .* has no 'MyModel'"):
        prunekit.load(tmp_path)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_a_loaded_mixture_of_experts_computes_the_same(tmp_path, model_type):
    """Files have a matrix for each expert, transformers one tensor for all."""
    model, ids = tiny(model_type), torch.arange(3, 12)[None]
    model.save_pretrained(tmp_path)
    loaded = prunekit.load(tmp_path)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
