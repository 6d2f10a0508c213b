"""Zeros stay zero: under any optimizer, and when an adapter is merged."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunekit.errors import ConfigError
from prunekit.inference.sparse_linear import SparseLinear
from prunekit.training.lora import merge_adapters, merge_low_rank
from prunekit.training.masks import keep_masks
from tests.kernels.sparse import two_of_four
from tests.support.architectures import tiny

OPTIMIZERS = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1, amsgrad=True),
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Nesterov": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True),
    "Adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.1),
    "RMSprop": lambda weights: torch.optim.RMSprop(weights, lr=0.1, momentum=0.9, centered=True),
}


def pruned():
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), Conv1D(8, 12), nn.Linear(8, 3))
    model[0].weight.data = two_of_four(12, 16)
    model[2].weight.data = two_of_four(12, 8)
    return model


def step(model, optimizer, times=3):
    for _ in range(times):
        optimizer.zero_grad()
        model(torch.randn(5, 16)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("watched", [True, False], ids=["its optimizer", "any optimizer"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_zeros_stay_zero_and_the_rest_learns(make, watched):
    model = pruned()
    optimizer = make(model.parameters())
    step(model, optimizer, 1)  # moments from before the pruning
    weights = [model[0].weight, model[2].weight]
    for weight, pattern in zip(weights, pruned()[:3:2], strict=True):
        weight.data *= pattern.weight != 0
    before = [weight.detach().clone() for weight in weights]
    with keep_masks(model, optimizer if watched else None) as masks:
        assert list(masks.weights) == ["0.weight", "2.weight"]
        step(model, optimizer)
    for weight, old in zip(weights, before, strict=True):
        gone = old == 0
        assert (weight[gone] == 0).all()
        assert (weight[~gone] != old[~gone]).any()
        state = [part for part in optimizer.state[weight].values() if part.shape == weight.shape]
        assert state
        assert all((part[gone] == 0).all() for part in state)


def test_without_masks_zeros_come_back():
    model = pruned()
    zeros = (model[0].weight == 0).sum()
    keep_masks(model).remove()
    step(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    assert (model[0].weight == 0).sum() < zeros


def test_gradients_are_zero_where_weights_are():
    model = pruned()
    with keep_masks(model):
        model(torch.randn(5, 16)).sum().backward()
    assert (model[0].weight.grad[model[0].weight == 0] == 0).all()


def test_weights_changed_by_hand_are_masked_when_asked():
    model = pruned()
    zeros = model[0].weight == 0
    with keep_masks(model) as masks:
        model[0].weight.data += 1
        masks.apply()
    assert torch.equal(model[0].weight == 0, zeros)


def test_a_dense_model_is_refused():
    with pytest.raises(ConfigError, match=r"no linear layer of Linear has zeros\. Prune it first"):
        keep_masks(nn.Linear(4, 4))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "2:4", "bitmask"])
def test_an_adapter_is_merged_under_the_mask(kind):
    weight, down, up = two_of_four(12, 16), torch.randn(2, 16), torch.randn(12, 2)
    layer = nn.Linear(16, 12)
    layer.weight.data = weight.clone()
    if kind == "conv1d":
        layer = Conv1D(12, 16)
        layer.weight.data = weight.T.clone()
    elif kind != "linear":
        layer = SparseLinear.of(layer, kind)
    merge_low_rank(layer, down, up, 0.5)
    merged = layer.dense() if isinstance(layer, SparseLinear) else layer.weight
    merged = merged.T if kind == "conv1d" else merged
    torch.testing.assert_close(merged, (weight + 0.5 * up @ down) * (weight != 0))
    assert torch.equal(merged == 0, weight == 0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_an_adapter_of_peft_is_merged_under_the_mask(model_type):
    peft = pytest.importorskip("peft")
    model = tiny(model_type)
    targets = ["q_proj", "embed_tokens"] if model_type == "llama" else ["c_attn"]
    chosen = {
        name: module for name, module in model.named_modules() if name.rpartition(".")[2] in targets
    }
    for module in chosen.values():
        module.weight.data *= torch.rand_like(module.weight) > 0.5
    before = {name: module.weight.detach().clone() for name, module in chosen.items()}
    turned = model_type == "gpt2"
    config = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=turned)
    adapted = peft.get_peft_model(model, config)
    deltas = {}
    for name, module in adapted.base_model.model.named_modules():
        if name in chosen:
            looked_up = isinstance(module.base_layer, nn.Embedding)
            down, up = (
                getattr(module, f"lora_embedding_{part}")["default"]
                if looked_up
                else getattr(module, f"lora_{part}")["default"].weight
                for part in "AB"
            )
            nn.init.normal_(down)
            nn.init.normal_(up)
            delta = module.scaling["default"] * up @ down
            deltas[name] = delta.T if turned or looked_up else delta
    bare = merge_adapters(adapted)
    for name, old in before.items():
        new = bare.get_submodule(name).weight
        torch.testing.assert_close(new, (old + deltas[name]) * (old != 0))
    with pytest.raises(ConfigError, match="no LoRA adapter 'other'"):
        merge_adapters(bare, "other")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("change", ["dora", "merged"])
def test_what_no_sum_can_stand_for_is_refused_before_anything_is_changed(change):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=change == "dora")
    adapted = peft.get_peft_model(tiny("llama"), config)
    if change == "merged":
        adapted.merge_adapter()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    with pytest.raises(ConfigError, match="merged by peft, or is more than a product"):
        merge_adapters(adapted)
    after = adapted.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
