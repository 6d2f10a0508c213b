"""Pruning in memory: the same weights as a run, nothing else changed."""

import pytest
import torch

import prunekit
from prunekit.data.tokens import calibration_tokens
from prunekit.errors import ConfigError, NumericsError
from prunekit.models.sequential import pipeline
from prunekit.sparsify import block_tuning
from tests.support import checkpoints
from tests.support.architectures import tiny
from tests.support.blocks import HALF
from tests.support.checkpoints import planned
from tests.support.units import close_whole, randomized_model


@pytest.fixture
def ids():
    return torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Split samples into several batches, the last one smaller."""
    monkeypatch.setitem(pipeline.BATCH_TOKENS, "cpu", 36)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("propagation", ["block", "stage"])
def test_a_model_in_memory_is_pruned_as_its_checkpoint_is(
    tmp_path, model_type, propagation, monkeypatch
):
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")
    folder = checkpoints.write(tmp_path / "m", model_type)
    prune = {"method": "sparsegpt", "pattern": "2:4", "propagation": propagation}
    plan = planned(folder, tmp_path / "out", prune=prune)
    *_, finish = prunekit.run(plan)
    model = tiny(model_type)
    sources = plan.config.calibration.data
    tokens = calibration_tokens(checkpoints.tokenizer(), sources, 4, 12, 0)
    entries = prunekit.prune(model, tokens.ids, **prune)
    written = checkpoints.tensors(tmp_path / "out")
    for layer, entry in zip(finish.values["layers"], entries, strict=True):
        assert layer["relative_error"] == entry["relative_error"]
        weight = model.get_parameter(f"{entry['name']}.weight")
        assert torch.equal(weight, written[layer["tensor"]])


def test_blocks_are_tuned_on_pruned_inputs_also_without_statistics(ids, monkeypatch):
    """Statistics for the error alone do not change the weights that tuning ends with."""
    monkeypatch.setattr(block_tuning, "STEPS", 9)
    weights = []
    for measure_error in (True, False):
        model = tiny("llama")
        settings = {"method": "magnitude", "recover": "block", "measure_error": measure_error}
        prunekit.prune(model, ids, pattern="2:4", **settings)
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


@pytest.mark.parametrize("model_type", ["llama", "t5", "bert"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_model_in_memory_is_left_as_it_was_found(model_type, fails, ids):
    model = tiny(model_type).train()
    frozen = model.get_input_embeddings().eval()
    configs = [module.config.to_dict() for module in model.modules() if hasattr(module, "config")]
    modules, hooks = list(model.named_modules()), _hooks(model)
    if fails:
        with torch.no_grad():
            model.get_input_embeddings().weight[ids[0, 0]] = torch.nan
        with pytest.raises(NumericsError):
            prunekit.prune(model, ids, pattern="2:4")
    else:
        prunekit.prune(model, ids, pattern="2:4")
    assert {module for module in model.modules() if not module.training} == {frozen}
    assert configs == [m.config.to_dict() for m in model.modules() if hasattr(m, "config")]
    assert (list(model.named_modules()), _hooks(model)) == (modules, hooks)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not torch.is_inference_mode_enabled()
    if not fails:
        model(input_ids=ids, labels=ids).loss.backward()


def _hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_a_method_that_looks_at_weights_alone_needs_no_tokens(ids):
    model = tiny("llama")
    entries = prunekit.prune(model, method="magnitude", pattern="2:4")
    assert {entry["sparsity"] for entry in entries} == {0.5}
    assert {entry["relative_error"] for entry in entries} == {None}
    with pytest.raises(ConfigError, match=r"^method wanda: needs calibration tokens"):
        prunekit.prune(model, method="wanda", pattern="2:4")
    with pytest.raises(ConfigError, match="needs calibration tokens"):
        prunekit.prune(model, method="magnitude", allocation="owl", **HALF)


def test_a_setting_that_cannot_be_meant_is_refused(ids):
    with pytest.raises(ConfigError, match=r"sparsity.*fixes the sparsity"):
        prunekit.prune(tiny("llama"), ids, pattern="2:4", sparsity=0.6)
    with pytest.raises(ConfigError, match="damping"):
        prunekit.prune(tiny("llama"), ids, method="wanda", pattern="2:4", damping=0.1)


def test_the_state_of_a_model_remains():
    """Modes, gradients, strides and dtype are as before; shared weights are pruned once."""
    model = tiny("llama").to(torch.bfloat16).train()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    first.down_proj.weight.requires_grad = False
    first.gate_proj.weight = torch.nn.Parameter(first.gate_proj.weight.T.contiguous().T)
    first.eval()
    states = [(m, m.training) for m in model.modules()]
    parameters = {name: (p, p.stride(), p.requires_grad) for name, p in model.named_parameters()}
    prunekit.prune(model, method="magnitude", pattern="2:4")
    assert all(module.training == training for module, training in states)
    for name, parameter in model.named_parameters():
        assert (parameter, parameter.stride(), parameter.requires_grad) == parameters[name]
    for mlp in (first, second):
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            assert (linear.weight == 0).double().mean() == 0.5


def test_a_mistake_in_a_setting_is_named_as_in_a_config(ids):
    for settings, message in (
        ({"method": "x"}, 'method: "x" is not a method'),
        ({"sparsity": "x"}, 'sparsity: "x" is not a number'),
        ({"sparsity": 0.5, "dampin": 1}, 'dampin: no such key. Did you mean "damping"'),
        ({"sparsity": 0.5, "skip": "x"}, 'skip: "x" is not a list'),
    ):
        with pytest.raises(ConfigError, match=message):
            prunekit.prune(tiny("llama"), ids, **settings)


@pytest.mark.parametrize("propagation", ["block", "stage"])
@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_layers_without_units_are_passed_and_the_rest_is_pruned(model_type, propagation, ids):
    model = randomized_model(model_type)
    for kind in ("heads", "neurons"):
        close_whole(model, kind, (0,)).finalize()
    prune = {"method": "sparsegpt", "pattern": "2:4", "propagation": propagation}
    entries = prunekit.prune(model, ids, **prune)
    assert {entry["sparsity"] for entry in entries} == {0.5}
    assert [entry["name"] for entry in entries if ".0.self_attn" in entry["name"]] == []


def test_an_error_shows_nothing_of_pydantic(ids):
    with pytest.raises(ConfigError) as caught:
        prunekit.prune(tiny("llama"), ids, sparsity="half")
    assert caught.value.__suppress_context__
    assert str(caught.value) == 'sparsity: "half" is not a number.'
