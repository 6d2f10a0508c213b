"""Residual stream coordinates: gated at readers, removed from every matrix."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5LayerNorm

import prunekit
from prunekit.errors import ShapeError
from tests.support.adapters import PEFT_WARNS, adapted_model
from tests.support.architectures import TINY
from tests.support.tiers import often
from tests.support.units import batch, randomized_model, valid_logits

CAN = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "t5")
TOKENS = torch.randint(3, 96, (3, 10), generator=torch.Generator().manual_seed(3))


def keep_some(gates, count=20):
    (gate,) = gates.gates.values()
    kept = torch.randperm(32, generator=torch.Generator().manual_seed(5))[:count]
    gate.keep[:] = False
    gate.keep[kept] = True
    return kept.sort().values


@pytest.mark.parametrize("model_type", often(CAN))
def test_a_narrower_model_answers_as_the_gated_one_and_opens_as_stock(model_type, tmp_path):
    """RMSNorms and factors of the square root of the width are rescaled."""
    model = randomized_model(model_type)
    given = batch(model)
    dense = valid_logits(model, given)
    gates = prunekit.hidden(model)
    (place,) = gates.groups
    assert torch.equal(valid_logits(model, given), dense)
    keep_some(gates)
    expected = valid_logits(model, given)
    assert (expected - dense).abs().max() > 1e-2 * dense.abs().max()
    before, gone = model.num_parameters(), 12 / 32 * float(place.costs.sum())
    done = gates.finalize()
    found = valid_logits(model, given)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert done.stock
    assert model.num_parameters() == before - gone
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(valid_logits(opened, given), found)


@pytest.mark.filterwarnings(*PEFT_WARNS)
def test_coordinates_of_t5_with_adapters_are_cut_and_merged_exactly(monkeypatch):
    """In float64, with norms in float64 too.

    Attention of T5 is not divided by √d, so random weights amplify roundings: in float32 the gated
    model is off by up to 3e-5 of its largest logit, and weights off by one rounding change it by up
    to 7e-5; so much the cut and the merged one differ too.
    """

    def norm(self, x):
        mean = x.square().mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(mean + self.variance_epsilon)

    monkeypatch.setattr(T5LayerNorm, "forward", norm)
    model = adapted_model("t5").double()
    given = batch(model)
    gates = prunekit.hidden(model)
    keep_some(gates)
    expected = valid_logits(model, given)
    gates.finalize()
    for found in (model, model.merge_and_unload()):
        assert (valid_logits(found, given) - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_a_closed_gate_is_zeros_in_whatever_writes_and_reads_the_coordinate():
    """The reference has zeroed matrices and norms over the full width."""
    model, other = randomized_model("llama"), randomized_model("llama")
    given = batch(model)
    kept = keep_some(prunekit.hidden(model))
    gone = torch.ones(32, dtype=torch.bool)
    gone[kept] = False
    with torch.no_grad():
        other.model.embed_tokens.weight[:, gone] = 0
        for layer in other.model.layers:
            layer.self_attn.o_proj.weight[gone] = 0
            layer.mlp.down_proj.weight[gone] = 0
    torch.testing.assert_close(valid_logits(model, given), valid_logits(other, given))


def test_a_norm_of_fewer_coordinates_is_that_of_all_with_zeros():
    """w' = w √(d/d') and ε' = ε d/d', in float64."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 20:] = 0
    norm, other = LlamaRMSNorm(32, eps=0.1).double(), LlamaRMSNorm(20, eps=0.1 * 32 / 20).double()
    other.weight.data = norm.weight.data[:20] * (32 / 20) ** 0.5
    model = randomized_model("llama", rms_norm_eps=0.1)
    gates = prunekit.hidden(model)
    keep_some(gates)
    gates.finalize()
    assert model.config.rms_norm_eps == other.variance_epsilon
    assert model.model.norm.variance_epsilon == other.variance_epsilon
    # transformers computes the squares in float32
    torch.testing.assert_close(other(x[:, :20]), norm(x)[:, :20], rtol=1e-6, atol=1e-6)


def test_tied_embeddings_stay_tied_and_heads_keep_their_size():
    model = randomized_model("qwen2", tie_word_embeddings=True)
    gates = prunekit.hidden(model)
    keep_some(gates)
    gates.finalize()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (96, 20)
    assert model.config.hidden_size == 20
    assert model.config.head_dim == 8
    attention = model.model.layers[1].self_attn
    assert attention.q_proj.weight.shape == (32, 20)
    assert attention.o_proj.weight.shape == (20, 32)
    assert model.model.layers[0].mlp.down_proj.out_features == 20


def test_text_is_written_by_a_narrower_model_that_was_opened_again(tmp_path):
    model = randomized_model("gemma3_text")
    prompt = {"input_ids": batch(model)["input_ids"][1:]}
    gates = prunekit.hidden(model)
    gates.prune(gates.score("magnitude"), 0.25)
    expected = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    gates.finalize()
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(opened.generate(**prompt, max_new_tokens=5, do_sample=False), expected)


def test_magnitude_is_the_sum_of_the_norms_of_a_coordinate_in_every_matrix():
    model = randomized_model("llama")
    (scores,) = prunekit.hidden(model).score("magnitude").values()
    parts = [model.model.embed_tokens.weight[:, 3], model.lm_head.weight[:, 3]]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        parts += [linear.weight[:, 3] for linear in readers]
        parts += [attention.o_proj.weight[3], mlp.down_proj.weight[3]]
    torch.testing.assert_close(scores[3], sum(part.double().norm() for part in parts).detach())


def test_the_gradient_of_a_gate_is_that_of_finite_differences():
    model = randomized_model("llama").double()
    given = batch(model)
    (gate,) = prunekit.hidden(model).gates.values()
    value = torch.ones(32, dtype=torch.float64, requires_grad=True)
    with gate.holding(value):
        model(**given).logits.square().mean().backward()
    ends = []
    for sign in (1, -1):
        moved = torch.ones(32, dtype=torch.float64)
        moved[7] += sign * 1e-4
        with gate.holding(moved), torch.no_grad():
            ends.append(model(**given).logits.square().mean())
    # transformers computes norms in float32
    torch.testing.assert_close(value.grad[7], (ends[0] - ends[1]) / 2e-4, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("ranker", ["gradient", "random", "hybrid"])
def test_rankers_of_gates_rank_coordinates_too(ranker):
    settings = {"of": {"gradient": 1.0, "magnitude": 1.0}} if ranker == "hybrid" else {}
    (scores,) = (
        prunekit.hidden(randomized_model("llama")).score(ranker, TOKENS, **settings).values()
    )
    assert len(scores) == 32
    assert len(scores.unique()) > 20  # sums of ranks may be tied


@pytest.mark.parametrize("model_type", sorted(set(TINY) - {*CAN}))
def test_families_with_a_layer_norm_are_refused_with_the_reason(model_type):
    with pytest.raises(ShapeError, match=f"'{model_type}' normalise with LayerNorm, whose mean"):
        prunekit.hidden(randomized_model(model_type))


def test_refuses_a_width_that_transformers_refuses():
    model = randomized_model("llama")
    gates = prunekit.hidden(model)
    keep_some(gates, 21)
    before = model.model.norm.weight.clone()
    with pytest.raises(ShapeError, match=r"hidden_size = 21.*not a multiple"):
        gates.finalize()
    assert torch.equal(model.model.norm.weight, before)
