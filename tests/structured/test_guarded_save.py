"""``save_pretrained`` never writes silently a model without its gates."""

import copy
import io

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunekit
from prunekit.errors import ConfigError
from tests.support.units import batch, randomized_model, valid_logits


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("other", [lambda model: model, copy.deepcopy, saved_and_loaded])
def test_a_model_with_a_closed_gate_is_not_saved_as_if_dense(other, tmp_path):
    model = randomized_model("llama")
    prunekit.heads(model).gate(0, 1, 0.0)
    model = other(model)
    heads = prunekit.heads(model)
    for folder, state in (("a", None), ("b", model.state_dict())):
        with pytest.raises(ConfigError, match=r"1 gates on heads .*heads\.finalize\(\) first"):
            model.save_pretrained(tmp_path / folder, state_dict=state)
        assert not (tmp_path / folder).exists()
    heads.undo()
    model.save_pretrained(tmp_path / "open")
    heads.gate(0, 1, 0.5)
    with pytest.raises(ConfigError, match="1 gates on heads"):
        model.save_pretrained(tmp_path / "half")
    heads.detach()
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "detached")


def test_a_finalized_model_is_saved_and_opens_with_its_output(tmp_path):
    model = randomized_model("llama")
    given = batch(model)
    neurons = prunekit.neurons(model)
    neurons.prune(neurons.score("magnitude"), 0.5, scope="layer")
    neurons.finalize()
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(valid_logits(opened, given), valid_logits(model, given))


def test_a_trainers_checkpoint_has_the_dense_weights_and_the_gates_beside_them(tmp_path):
    """As ``Trainer._save_checkpoint`` and a callback's ``on_save`` call them."""
    model = randomized_model("llama")
    given = batch(model)
    heads, neurons = prunekit.heads(model), prunekit.neurons(model)
    heads.gate(1, 1, 0.0)
    neurons.gate(0, 5, 0.0)
    heads.dense_saves = True
    with pytest.raises(ConfigError, match=r"neurons\.dense_saves = True"):
        model.save_pretrained(tmp_path, state_dict=model.state_dict(), is_main_process=True)
    neurons.dense_saves = True
    model.save_pretrained(tmp_path, state_dict=model.state_dict(), is_main_process=True)
    for gates in (heads, neurons):
        gates.save(tmp_path / f"{gates.kind}.safetensors")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for kind in ("heads", "neurons"):
        getattr(prunekit, kind)(opened).load(tmp_path / f"{kind}.safetensors")
    assert torch.equal(valid_logits(opened, given), valid_logits(model, given))


def test_what_replaced_save_pretrained_before_is_called_and_restored(tmp_path):
    model = randomized_model("llama")
    calls = []
    model.save_pretrained = calls.append
    heads, neurons = prunekit.heads(model), prunekit.neurons(model)
    model.save_pretrained(tmp_path)
    heads.detach()
    neurons.gate(0, 0, 0.0)
    with pytest.raises(ConfigError, match="1 gates on neurons"):
        model.save_pretrained(tmp_path)
    neurons.detach()
    model.save_pretrained(tmp_path)
    assert calls == [tmp_path, tmp_path]
