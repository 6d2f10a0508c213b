"""Low-rank adapters as shares of units: scored, gated, held and removed with them."""

import copy

import pytest
import torch

import prunekit
from prunekit.errors import ConfigError
from prunekit.models.adapters import assign_weight, effective_weight
from prunekit.training import mask_adapters, merge_adapters
from tests.support.adapters import PEFT_WARNS, adapted_model, zero_randomly
from tests.support.tiers import DISTINCT, often
from tests.support.units import EQUAL_DEPTH, batch, randomized_model, valid_logits

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(*PEFT_WARNS)
TOKENS = torch.randint(3, 96, (12, 10), generator=torch.Generator().manual_seed(4))
LINEAR_KINDS = ("heads", "neurons")
FAMILIES = ("bert", "gemma2", "gpt2", "gpt_neox", "llama", "phi3", "t5")


def assert_same(logits, expected):
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("model_type", often(FAMILIES, DISTINCT - {"gpt_neox"}))
@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_the_smaller_model_with_adapters_equals_the_gated_one(model_type, kind):
    """Also with a half-open gate, and after merging; the adapters can still be trained."""
    model = adapted_model(
        model_type, base=randomized_model(model_type, **EQUAL_DEPTH.get(model_type, {}))
    )
    given = batch(model.get_base_model())
    dense = valid_logits(model, given)
    gates = getattr(prunekit, kind)(model)
    gates.prune(gates.score("magnitude"), 0.5, scope="layer")
    gates.gate(0, gates.kept[gates.groups[0].name][0], 0.5)
    gated = valid_logits(model, given)
    done = gates.finalize()
    assert_same(valid_logits(model, given), gated)
    assert (gated - dense).abs().max() > 0.01
    assert done.parameters[1] == sum(each.numel() for each in model.parameters())
    assert_same(valid_logits(merge_adapters(copy.deepcopy(model)), given), gated)
    model(**given).logits.square().mean().backward()
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert all(".lora_" in name and each.grad is not None for name, each in trained.items())
    for layer in model.modules():
        if hasattr(layer, "base_layer"):
            down, up = layer.lora_A["default"], layer.lora_B["default"]
            assert (layer.in_features, layer.out_features) == (down.in_features, up.out_features)


WHOLE = [("llama", "hidden"), ("phi3", "hidden"), ("llama", "blocks"), ("t5", "blocks")]


@pytest.mark.parametrize(("model_type", "kind"), WHOLE)
def test_coordinates_and_blocks_are_removed_with_their_adapters(model_type, kind):
    model = adapted_model(
        model_type, base=randomized_model(model_type, **EQUAL_DEPTH.get(model_type, {}))
    )
    given = batch(model.get_base_model())
    gates = getattr(prunekit, kind)(model.get_base_model())
    gates.prune(gates.score("magnitude"), 0.5)
    gated = valid_logits(model, given)
    gates.finalize()
    assert_same(valid_logits(model, given), gated)
    assert_same(valid_logits(merge_adapters(model), given), gated)


def test_adapters_of_embeddings_are_narrowed_with_the_coordinates():
    model = adapted_model("llama", ["embed_tokens", "q_proj", "down_proj"])
    base = model.get_base_model()
    given = batch(base)
    gates = prunekit.hidden(model)
    gates.prune(gates.score("magnitude"), 0.5)
    gated = valid_logits(model, given)
    gates.finalize()
    table = base.model.embed_tokens
    assert (table.in_features, table.out_features) == (96, 16)
    assert table.lora_embedding_B["default"].shape == (16, 2)
    assert_same(valid_logits(model, given), gated)
    assert_same(valid_logits(merge_adapters(model), given), gated)
    scaled = adapted_model("gemma2", ["embed_tokens"])
    with pytest.raises(ConfigError, match="embed_tokens: this family scales its embeddings"):
        prunekit.hidden(scaled)


def test_the_parts_of_adapters_are_counted_with_their_units():
    """A rank r adds r per output of a writer and r per input of the reader."""
    plain = prunekit.heads(randomized_model("llama")).groups[0]
    adapted = prunekit.heads(adapted_model("llama")).groups[0]
    # A key head with two query heads of 8 features: 4 · 8 outputs, and 2 · 8 inputs.
    assert (adapted.costs - plain.costs).tolist() == [2 * (4 * 8 + 2 * 8)] * 2
    assert len(adapted.parameter_axes) == 2 * len(plain.parameter_axes)
    only = prunekit.heads(adapted_model("llama", ["v_proj", "gate_proj"])).groups[0]
    assert (only.costs - plain.costs).tolist() == [2 * 8] * 2


@pytest.mark.parametrize("ranker", ["magnitude", "output-norm", "obs", "gradient", "salience"])
def test_units_have_the_scores_of_the_merged_model(ranker):
    adapted = adapted_model("llama")
    merged = copy.deepcopy(adapted).merge_and_unload()
    mine = prunekit.heads(adapted).score(ranker, TOKENS)
    theirs = prunekit.heads(merged).score(ranker, TOKENS)
    for name, score in theirs.items():
        torch.testing.assert_close(mine[name], score, rtol=1e-3, atol=1e-6)


def test_a_refit_counts_the_adapter_in():
    """The refitted model equals the refitted merged one."""
    adapted = adapted_model("llama")
    merged = copy.deepcopy(adapted).merge_and_unload()
    given = batch(merged)
    for model in (adapted, merged):
        gates = prunekit.neurons(model)
        gates.close({name: torch.arange(64) % 2 == 0 for name in gates.keep})
        gates.finalize(TOKENS)
    torch.testing.assert_close(
        valid_logits(adapted, given), valid_logits(merged, given), rtol=1e-3, atol=1e-3
    )


def test_adapters_of_closed_units_are_held():
    model = adapted_model("llama", ["q_proj", "o_proj"])
    gates = prunekit.heads(model)
    gates.close({name: torch.tensor([False, True]) for name in gates.keep})
    layer = model.get_base_model().model.layers[0].self_attn
    up, down = layer.q_proj.lora_B["default"].weight, layer.o_proj.lora_A["default"].weight
    before = up.detach().clone(), down.detach().clone()
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), 0.1)
    with gates.hold(optimizer):
        model(TOKENS).logits.square().mean().backward()
        optimizer.step()
    assert torch.equal(up[:16], before[0][:16])
    assert torch.equal(down[:, :16], before[1][:, :16])
    assert (up[16:] != before[0][16:]).all()
    assert (down[:, 16:] != before[1][:, 16:]).all()


def test_units_and_masks_of_weights_act_together():
    """Removed units take their masks with them."""
    model = adapted_model("llama")
    zero_randomly(model)
    given = batch(model.get_base_model())
    with mask_adapters(model):
        gates = prunekit.neurons(model)
        gates.prune(gates.score("magnitude"), 0.5)
        gated = valid_logits(model, given)
        gates.finalize()
        assert_same(valid_logits(model, given), gated)
    assert_same(valid_logits(merge_adapters(model), given), gated)


def test_adapters_that_are_not_active_are_narrowed_too():
    model = adapted_model("llama", names=("first", "second"))
    given = batch(model.get_base_model())
    gates = prunekit.heads(model)
    gates.prune(gates.score("magnitude"), 0.5)
    model.set_adapter("second")
    gated = valid_logits(model, given)
    model.set_adapter("first")
    gates.finalize()
    model.set_adapter("second")
    assert_same(valid_logits(model, given), gated)


def test_a_copy_trained_as_a_whole_is_left_alone():
    base = randomized_model("gpt2")
    model = adapted_model("gpt2", ["c_attn"], base=base, modules_to_save=["lm_head"])
    copied = base.lm_head.modules_to_save["default"].weight
    gates = prunekit.heads(model)
    gates.prune(gates.score("magnitude"), 0.5)
    gates.finalize()
    assert base.lm_head.modules_to_save["default"].weight is copied


def test_adapters_added_behind_the_back_of_gates_are_noticed():
    base = randomized_model("llama")
    gates = prunekit.heads(base)
    gates.prune(gates.score("magnitude"), 0.5)
    model = adapted_model("llama", base=base)
    before = [*base.parameters()]
    with pytest.raises(ConfigError, match=r"heads: adapters were added .*relocate\(\)"):
        gates.finalize()
    assert all(one is other for one, other in zip(before, base.parameters(), strict=True))
    given = batch(base)
    prunekit.heads(model).relocate()
    gated = valid_logits(model, given)
    gates.finalize()
    assert_same(valid_logits(model, given), gated)


@pytest.mark.parametrize("kind", LINEAR_KINDS)
@pytest.mark.parametrize("change", ["dora", "ia3", "whole"])
def test_adapters_whose_parts_belong_to_no_unit_are_refused(kind, change):
    base = randomized_model("llama")
    names = ["o_proj", "down_proj"]
    if change == "ia3":
        config = peft.IA3Config(target_modules=names, feedforward_modules=["down_proj"])
        model = peft.get_peft_model(base, config)
    else:
        settings = {"use_dora": True} if change == "dora" else {"modules_to_save": names}
        targets = names if change == "dora" else ["v_proj"]
        model = adapted_model("llama", targets, base=base, **settings)
    with pytest.raises(ConfigError, match=r"layers\.0\..* so no part of it belongs to one unit"):
        getattr(prunekit, kind)(model)


def test_the_effective_weight_has_the_active_adapters():
    model = adapted_model("gpt2", ["c_attn"], names=("first", "second"))
    zero_randomly(model)
    layer = model.get_base_model().transformer.h[0].attn.c_attn
    base = layer.base_layer.weight.T
    product = layer.get_delta_weight("first").T
    torch.testing.assert_close(effective_weight(layer), base + product)
    with mask_adapters(model, "first"):
        torch.testing.assert_close(effective_weight(layer), base + product * (base != 0))
    with model.disable_adapter():
        assert torch.equal(effective_weight(layer), base)
    model.merge_adapter()
    torch.testing.assert_close(effective_weight(layer), base)
    torch.testing.assert_close(effective_weight(layer.base_layer), base)


def test_the_sum_of_weight_and_masked_adapter_is_pruned():
    """By magnitude the weights are kept as they are; a method that changes them changes the sum."""
    for method, tokens in (("magnitude", None), ("sparsegpt", TOKENS)):
        model = adapted_model("llama")
        base, given = model.get_base_model(), batch(model.get_base_model())
        merged = copy.deepcopy(model).merge_and_unload()
        before = base.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
        with pytest.raises(ConfigError, match=r"q_proj is not masked.*mask_adapters\(model\)"):
            prunekit.prune(model, tokens, method=method, sparsity=0.5)
        with mask_adapters(model):
            records = prunekit.prune(model, tokens, method=method, sparsity=0.5)
            others = prunekit.prune(merged, tokens, method=method, sparsity=0.5)
            pruned = valid_logits(model, given)
        assert [each["sparsity"] for each in records] == [each["sparsity"] for each in others]
        torch.testing.assert_close(pruned, valid_logits(merged, given), rtol=1e-3, atol=1e-3)
        after = base.model.layers[0].self_attn.q_proj.base_layer.weight
        assert torch.equal(after[after != 0], before[after != 0]) == (method == "magnitude")
        assert_same(valid_logits(merge_adapters(model), given), pruned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_assigned_weight_differs_by_is_added_to_the_own_one(dtype):
    base = randomized_model("llama").to(dtype)
    layer = (
        adapted_model("llama", ["q_proj"], base=base)
        .get_base_model()
        .model.layers[0]
        .self_attn.q_proj
    )
    own = layer.base_layer.weight.detach().clone()
    whole = effective_weight(layer).to(dtype)
    assign_weight(layer, torch.where(whole > 0, whole, 0))
    assert torch.equal(layer.base_layer.weight, torch.where(whole > 0, own, 0))
    assign_weight(layer.base_layer, own)
    assert torch.equal(layer.base_layer.weight, own)


def test_an_optimizer_of_adapters_goes_on_with_the_parts_that_are_left():
    """The moments of kept parts are those from before, and every adapter is still trained."""
    model = adapted_model("llama", ["q_proj", "o_proj"])
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.01)
    gates = prunekit.heads(model)
    gates.close({name: torch.tensor([False, True]) for name in gates.keep})
    model(TOKENS).logits.square().mean().backward()
    optimizer.step()
    layer = model.get_base_model().model.layers[0].self_attn
    moments = [optimizer.state[each]["exp_avg"].clone() for each in factors_of(layer)]
    gated = valid_logits(model, {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)})
    gates.finalize(optimizer=optimizer)
    up, down = factors_of(layer)
    assert torch.equal(optimizer.state[up]["exp_avg"], moments[0][16:])
    assert torch.equal(optimizer.state[down]["exp_avg"], moments[1][:, 16:])
    assert {*optimizer.param_groups[0]["params"]} == {
        each for each in model.parameters() if each.requires_grad
    }
    logits = model(TOKENS).logits
    assert_same(logits.detach().flatten(0, 1), gated)
    logits.square().mean().backward()
    before = up.detach().clone(), down.detach().clone()
    optimizer.step()
    assert not torch.equal(up, before[0])
    assert not torch.equal(down, before[1])


def factors_of(attention):
    """Return the factor of the queries with a row for each, and that of the output's inputs."""
    return attention.q_proj.lora_B["default"].weight, attention.o_proj.lora_A["default"].weight
