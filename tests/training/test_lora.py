"""Adapters added to a model, and merged under the masks of pruned weights."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import prunekit
from prunekit.errors import ConfigError
from prunekit.inference.sparse_linear import SparseLinear
from prunekit.training.lora import add_adapter, merge_adapters, merge_low_rank
from tests.kernels.sparse import two_of_four
from tests.support.adapters import PEFT_WARNS, adapted_model, randomize_adapters
from tests.support.architectures import tiny
from tests.support.units import batch, randomized_model, valid_logits


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


@pytest.mark.filterwarnings(*PEFT_WARNS)
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


@pytest.mark.filterwarnings(*PEFT_WARNS)
@pytest.mark.parametrize("change", ["dora", "merged"])
def test_what_no_sum_can_stand_for_is_refused_before_anything_is_changed(change):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=change == "dora")
    adapted = peft.get_peft_model(tiny("llama"), config)
    if change == "merged":
        adapted.merge_adapter()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    with pytest.raises(ConfigError, match=r"peft has merged|more than a product"):
        merge_adapters(adapted)
    after = adapted.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.filterwarnings(*PEFT_WARNS)
def test_an_adapter_of_a_weight_that_two_modules_share_is_not_merged():
    """Merging would change the other module too."""
    base = randomized_model("llama", tie_word_embeddings=True)
    adapted = adapted_model("llama", ["embed_tokens"], base=base)
    with pytest.raises(ConfigError, match=r"embed_tokens.* and lm_head.weight are one weight"):
        merge_adapters(adapted)


@pytest.mark.filterwarnings(*PEFT_WARNS)
def test_merging_one_of_two_active_adapters_is_refused():
    adapted = adapted_model("llama", ["q_proj"], names=("first", "second"))
    adapted.base_model.set_adapter(["first", "second"])
    with pytest.raises(ConfigError, match=r"'second' is active too.*set_adapter\('first'\)"):
        merge_adapters(adapted, "first")
    adapted.set_adapter("first")
    merge_adapters(adapted, "first")


@pytest.mark.filterwarnings(*PEFT_WARNS)
def test_modules_trained_as_a_whole_are_in_the_merged_model_and_single_tokens_are_refused():
    base = randomized_model("llama")
    adapted = adapted_model("llama", ["q_proj"], base=base, modules_to_save=["lm_head"])
    base.lm_head.modules_to_save["default"].weight.data.mul_(2)
    given = batch(base)
    before = valid_logits(adapted, given)
    torch.testing.assert_close(valid_logits(merge_adapters(adapted), given), before)
    adapted = adapted_model("llama", ["q_proj"], trainable_token_indices=[1, 2])
    with pytest.raises(ConfigError, match=r"single tokens of model\.embed_tokens were trained"):
        merge_adapters(adapted)


@pytest.mark.filterwarnings(*PEFT_WARNS)
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5"])
def test_a_new_adapter_changes_no_bit_of_the_output_and_is_trained_alone(model_type):
    model = randomized_model(model_type)
    given = batch(model)
    before = valid_logits(model, given)
    adapted = add_adapter(model, 2, dropout=0.1, seed=1)
    assert torch.equal(valid_logits(adapted, given), before)
    trained = {name for name, each in adapted.named_parameters() if each.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    again = add_adapter(randomized_model(model_type), 2, seed=1)
    for (_, one), (_, other) in zip(
        adapted.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings(*PEFT_WARNS)
def test_a_new_adapter_is_float32_and_no_random_number_is_used_up():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    adapted = add_adapter(tiny("llama").to(torch.bfloat16), 4, ["query"], alpha=4)
    assert torch.equal(torch.rand(1), expected)
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert layer.lora_A["default"].weight.shape == (4, 32)
    assert layer.scaling["default"] == 1


@pytest.mark.filterwarnings(*PEFT_WARNS)
def test_gates_act_on_an_adapter_added_later_and_on_the_merged_model():
    model = randomized_model("llama")
    given = batch(model)
    gates = prunekit.neurons(model)
    gates.prune(gates.score("magnitude"), 0.5)
    adapted = add_adapter(model, 2)
    randomize_adapters(adapted)
    gated = valid_logits(adapted, given)
    assert prunekit.neurons(adapted) is gates
    merged = merge_adapters(adapted)
    torch.testing.assert_close(valid_logits(merged, given), gated, rtol=1e-5, atol=1e-5)
    gates.finalize()
    torch.testing.assert_close(valid_logits(merged, given), gated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0 is not a whole number of at least 1"),
        ({"rank": 2.5}, "rank 2.5 is not a whole number"),
        ({"rank": 2, "alpha": 0}, "alpha 0 is not a positive number"),
        ({"rank": 2, "dropout": 1.0}, r"dropout 1.0 is not in \[0, 1\)"),
    ],
)
def test_numbers_of_an_adapter_are_checked(settings, message):
    with pytest.raises(ConfigError, match=f"adapter: {message}"):
        add_adapter(tiny("llama"), **settings)


@pytest.mark.filterwarnings(*PEFT_WARNS)
def test_a_second_adapter_is_refused_and_without_peft_one_is_told_what_to_install(monkeypatch):
    adapted = add_adapter(tiny("llama"), 2)
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(ConfigError, match="adapters already"):
            add_adapter(model, 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'prunekit\[lora\]'"):
        add_adapter(tiny("llama"), 2)
