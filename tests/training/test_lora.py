"""Merging of adapters under the masks of pruned weights."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunekit.errors import ConfigError
from prunekit.inference.sparse_linear import SparseLinear
from prunekit.training.lora import merge_adapters, merge_low_rank
from tests.kernels.sparse import two_of_four
from tests.support.architectures import tiny


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
