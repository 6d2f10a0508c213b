"""Adapters under masks: the forward of training is that of the merged model."""

import copy
import pickle

import pytest
import torch
from torch import nn

import prunekit
from prunekit.errors import ConfigError
from prunekit.inference.sparse_linear import SparseLinear
from prunekit.training import add_adapter, keep_masks, mask_adapters, merge_adapters
from tests.kernels.sparse import two_of_four
from tests.support.adapters import PEFT_WARNS, adapted_model, randomize_adapters, zero_randomly
from tests.support.architectures import tiny
from tests.support.units import batch, valid_logits

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(*PEFT_WARNS)
FAMILIES = ("bert", "gpt2", "gpt_neox", "llama", "phi3", "t5")


def pruned_and_adapted(model_type="llama", targets="all-linear", **settings):
    model = adapted_model(model_type, targets, **settings)
    zero_randomly(model)
    return model


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_masked_forward_is_that_of_the_merged_model(model_type):
    """Merged by us or by peft; without masks the forward is far from it."""
    model = pruned_and_adapted(model_type)
    given = batch(model.get_base_model())
    unmasked = valid_logits(model, given)
    with mask_adapters(model):
        masked = valid_logits(model, given)
        by_peft = copy.deepcopy(model).merge_and_unload()
        checked = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert torch.equal(valid_logits(model, given), unmasked)
    zeros = {name: module.base_layer.weight == 0 for name, module in model.named_modules()
             if hasattr(module, "base_layer")}  # fmt: skip
    merged = merge_adapters(model)
    for each in (merged, by_peft, checked):
        torch.testing.assert_close(valid_logits(each, given), masked, rtol=1e-5, atol=1e-5)
        for name, zero in zeros.items():
            weight = each.get_submodule(name.removeprefix("base_model.model.")).weight
            assert torch.equal(weight == 0, zero)
    assert (unmasked - masked).abs().max() > 0.1


def test_merging_by_peft_can_be_taken_back():
    model = pruned_and_adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with mask_adapters(model):
        model.merge_adapter()
        model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in before.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_masked_product(checkpointing):
    """Also with gradient checkpointing, which runs the forward twice."""
    model = pruned_and_adapted(targets=["q_proj", "down_proj"])
    given = batch(model.get_base_model())
    if checkpointing:
        model.train()
        model.get_base_model().gradient_checkpointing_enable()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with mask_adapters(model):
        loss = model(**given).logits.square().mean()
        found = torch.autograd.grad(loss, trained.values())
    deltas = {}

    def product(layer, x, output):
        key = id(layer)
        if key not in deltas:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            keep = layer.base_layer.weight != 0
            deltas[key] = (b @ a) * keep * layer.scaling["default"]
        return layer.base_layer(x[0]) + x[0] @ deltas[key].T

    model.get_base_model().gradient_checkpointing_disable()
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    handles = [layer.register_forward_hook(product) for layer in layers]
    loss = model(**given).logits.square().mean()
    expected = torch.autograd.grad(loss, trained.values())
    for handle in handles:
        handle.remove()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        assert mine.abs().max() > 0


def test_dropout_drops_the_same_inputs_as_without_masks():
    """Without zeros the mask lets all through, with one seed the same output."""
    model = adapted_model("llama", lora_dropout=0.5).train()
    given = batch(model.get_base_model())
    outputs = []
    for masked in (False, True):
        torch.manual_seed(7)
        handles = mask_adapters(model) if masked else None
        outputs.append(model(**given).logits)
        loss = outputs[-1].square().mean()
        outputs.append(torch.autograd.grad(loss, model.get_parameter(A_OF_LAYER_0))[0])
        if handles:
            handles.remove()
    torch.testing.assert_close(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[3])
    torch.manual_seed(8)
    assert not torch.allclose(model(**given).logits, outputs[0])


A_OF_LAYER_0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"


def test_masks_follow_the_zeros_of_the_weights():
    """What a pruner zeroes later is masked from the next forward on."""
    model = adapted_model("llama")
    given = batch(model.get_base_model())
    with mask_adapters(model):
        dense = valid_logits(model, given)
        zero_randomly(model, 0.7)
        sparse = valid_logits(model, given)
        merged = valid_logits(merge_adapters(copy.deepcopy(model)), given)
    torch.testing.assert_close(sparse, merged, rtol=1e-5, atol=1e-5)
    assert (dense - sparse).abs().max() > 0.01


def test_each_of_several_adapters_is_masked_by_its_name():
    model = adapted_model("llama", names=("first", "second"))
    zero_randomly(model)
    given = batch(model.get_base_model())
    plain = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        plain[name] = valid_logits(model, given)
    with mask_adapters(model, "second"):
        assert not torch.equal(valid_logits(model, given), plain["second"])
        model.set_adapter("first")
        assert torch.equal(valid_logits(model, given), plain["first"])
        with mask_adapters(model, None):
            assert not torch.equal(valid_logits(model, given), plain["first"])
            merged = valid_logits(merge_adapters(copy.deepcopy(model), "first"), given)
            torch.testing.assert_close(valid_logits(model, given), merged, rtol=1e-5, atol=1e-5)
        assert torch.equal(valid_logits(model, given), plain["first"])
        model.set_adapter("second")
        assert not torch.equal(valid_logits(model, given), plain["second"])
    assert torch.equal(valid_logits(model, given), plain["second"])


def test_a_copy_has_masks_of_its_own():
    model = pruned_and_adapted()
    given = batch(model.get_base_model())
    with mask_adapters(model):
        masked = valid_logits(model, given)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    randomize_adapters(model.get_base_model().lm_head)
    model.get_base_model().lm_head.weight.data.zero_()
    for each in copies:
        assert torch.equal(valid_logits(each, given), masked)
        mask_adapters(each).remove()
        assert torch.equal(valid_logits(each, given), masked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_product_is_of_the_lower_precision(dtype):
    model = pruned_and_adapted()
    given = batch(model.get_base_model())
    with mask_adapters(model):
        exact = valid_logits(model, given)
        with torch.autocast("cpu", dtype):
            lower = model(**given).logits
        lower.float().square().mean().backward()
    valid = lower[given["attention_mask"].bool()].float()
    # 0.054 where the processor multiplies bfloat16 itself
    assert (valid - exact).abs().max() < 0.08 * exact.abs().max()
    gradient = model.get_parameter(A_OF_LAYER_0).grad
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()


def test_half_precision_weights_have_float32_adapters_that_merge():
    base = tiny("llama").to(torch.bfloat16)
    model = adapted_model("llama", base=base)
    zero_randomly(model)
    given = batch(base)
    with mask_adapters(model):
        masked = valid_logits(model, given).float()
    assert model.get_parameter(A_OF_LAYER_0).dtype == torch.float32
    merged = valid_logits(merge_adapters(model), given).float()
    assert (merged - masked).abs().max() < 0.05 * masked.abs().max()


def test_embeddings_are_masked_by_their_own_zeros():
    """peft's embeddings look up rows of the product instead of multiplying."""
    model = adapted_model("llama", ["embed_tokens"])
    base = model.get_base_model()
    given = batch(base)
    table = base.model.embed_tokens.base_layer.weight
    with torch.no_grad():
        table *= torch.rand_like(table) > 0.5
    with mask_adapters(model):
        masked = valid_logits(model, given)
    merged = valid_logits(merge_adapters(model), given)
    torch.testing.assert_close(merged, masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["2:4", "bitmask"])
def test_an_adapter_of_a_compressed_linear_is_masked_by_the_stored_mask(kind):
    model = tiny("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data = two_of_four(64, 32)
    model.model.layers[0].mlp.up_proj = SparseLinear.of(layer, kind)
    adapted = add_adapter(model, 2, ["up_proj"]).eval()
    randomize_adapters(adapted)
    given = batch(model)
    unmasked = valid_logits(adapted, given)
    with mask_adapters(adapted):
        masked = valid_logits(adapted, given)
    merged = merge_adapters(adapted)
    assert isinstance(merged.model.layers[0].mlp.up_proj, SparseLinear)
    torch.testing.assert_close(valid_logits(merged, given), masked, rtol=1e-5, atol=1e-5)
    assert (unmasked - masked).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dora", "more than a product of two matrices"),
        ("merged", "call unmerge_adapter first"),
        ("bias", "'default' has a bias"),
        ("quantized", "its weight is quantized"),
        ("ia3", "the model has no LoRA adapter 'default'"),
        ("adalora", "a SVDLinear of peft, no LoRA of a linear"),
        ("parameter", "a ParamWrapper of peft, no LoRA of a linear"),
        ("none", "the model has no LoRA adapter 'default'"),
        ("other", "no LoRA adapter 'default'; it has other"),
    ],
)
def test_what_cannot_be_masked_is_refused_before_any_change(change, message):
    peft = pytest.importorskip("peft")
    base = tiny("opt")
    settings = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}}.get(change, {})
    names = ("other",) if change == "other" else ("default",)
    if change == "none":
        model = base
    elif change == "ia3":
        config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        model = peft.get_peft_model(base, config)
    elif change == "adalora":
        config = peft.AdaLoraConfig(target_modules=["k_proj"], total_step=10)
        model = peft.get_peft_model(base, config)
    elif change == "parameter":
        model = adapted_model("opt", [], base=base, target_parameters=["q_proj.weight"])
    else:
        model = adapted_model("opt", ["q_proj", "k_proj"], base=base, names=names, **settings)
    if change == "merged":
        model.merge_adapter()
    if change == "quantized":
        layer = base.model.decoder.layers[1].self_attn.q_proj.base_layer
        layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    before = [getattr(module, "lora_variant", {}).copy() for module in model.modules()]
    with pytest.raises(ConfigError, match=message):
        mask_adapters(model)
    assert before == [getattr(module, "lora_variant", {}) for module in model.modules()]


@pytest.mark.parametrize("how", ["keep_masks", "gradual"])
def test_training_under_masks_masks_the_adapters_too(how):
    """What was trained is what is merged; the factors themselves, zero at first, are not masked."""
    base = tiny("llama")
    if how == "keep_masks":
        zero_randomly(base)
    model = add_adapter(base, 2, ["q_proj", "down_proj"])
    given = batch(base)
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), 0.01)
    if how == "keep_masks":
        masks = keep_masks(model, optimizer)
    else:
        masks = prunekit.GradualPruner(model, optimizer, sparsity=0.5, end=4, every=2)
    with masks:
        for _ in range(5):
            model(**given).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = valid_logits(model, given)
    assert not any("lora" in name for name in getattr(masks, "masks", masks).weights)
    assert all((each != 0).all() for name, each in model.named_parameters() if "lora_B" in name)
    merged = merge_adapters(model)
    torch.testing.assert_close(valid_logits(merged, given), trained, rtol=1e-5, atol=1e-5)
    weight = merged.model.layers[0].self_attn.q_proj.weight
    assert 0.4 < (weight == 0).float().mean() < 0.6
