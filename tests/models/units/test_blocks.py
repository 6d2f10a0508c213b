"""Whole blocks: bypassed by gates, ranked, and removed from the model."""

import pytest
import torch

import prunekit
from prunekit.checkpoint.compressed import KEPT_UNITS_KEY
from prunekit.errors import ConfigError, ShapeError
from tests.support.architectures import TINY
from tests.support.tiers import DISTINCT, often
from tests.support.units import batch, randomized_model, valid_logits

DEEPER = {
    "distilbert": {"n_layers": 3},
    "gpt2": {"n_layer": 3},
    "t5": {"num_layers": 3, "num_decoder_layers": 3},
}
TOKENS = torch.randint(3, 96, (3, 10), generator=torch.Generator().manual_seed(3))


def deeper(model_type, **overrides):
    return randomized_model(
        model_type, **DEEPER.get(model_type, {"num_hidden_layers": 3}), **overrides
    )


@pytest.mark.parametrize(
    "model_type", often([*sorted(TINY), "granite", "gpt_oss"], {*DISTINCT, "gpt_oss"})
)
def test_without_its_first_block_a_model_answers_as_the_gated_one_and_opens_as_stock(
    model_type, tmp_path
):
    """A gate at 0 bypasses its block, as removal does.

    T5's position bias moves to the new first block.
    """
    model = deeper(model_type)
    given = batch(model)
    dense = valid_logits(model, given)
    gates = prunekit.blocks(model)
    assert torch.equal(valid_logits(model, given), dense)
    for place in gates.groups:
        gates.gates[place.name].keep[0] = False
    expected = valid_logits(model, given)
    assert not torch.equal(expected, dense)
    before, gone = model.num_parameters(), sum(float(place.costs[0]) for place in gates.groups)
    done = gates.finalize()
    assert done.stock
    assert model.num_parameters() == before - gone
    assert torch.equal(valid_logits(model, given), expected)
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(valid_logits(opened, given), expected)


def test_what_a_closed_block_gives_is_what_it_reads():
    """The reference is the model's own forward without the block."""
    model, other = deeper("llama"), deeper("llama")
    given = batch(model)
    prunekit.blocks(model).gates["model.layers"].keep[1] = False
    del other.model.layers[1]
    other.config.num_hidden_layers = 2
    with torch.no_grad():
        logits = other(**given, use_cache=False).logits
    assert torch.equal(valid_logits(model, given), logits[given["attention_mask"].bool()])


def test_text_is_written_with_a_cache_by_fewer_blocks(tmp_path):
    """Blocks index the KV cache by number; removal must update it."""
    for model_type in ("gemma3_text", "t5"):
        model = deeper(model_type)
        prompt = {"input_ids": batch(model)["input_ids"][1:]}
        gates = prunekit.blocks(model)
        gates.prune(gates.score("random"), 0.3, scope="layer")
        expected = model.generate(**prompt, max_new_tokens=5, do_sample=False, use_cache=False)
        gates.finalize()
        found = model.generate(**prompt, max_new_tokens=5, do_sample=False)
        assert torch.equal(found, expected)
        model.save_pretrained(tmp_path / model_type)
        opened = type(model).from_pretrained(tmp_path / model_type).eval()
        assert torch.equal(opened.generate(**prompt, max_new_tokens=5, do_sample=False), expected)


def test_the_types_of_the_blocks_that_stay_are_what_the_config_says():
    model = deeper("gemma3_text")
    gates = prunekit.blocks(model)
    gates.gates["model.layers"].keep[0] = False
    gates.finalize()
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.config.num_hidden_layers == 2


def test_a_gate_between_has_the_gradient_of_what_the_block_adds():
    model = deeper("gpt2").double()
    given = batch(model)
    gate = prunekit.blocks(model).gates["transformer.h"]
    value = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    with gate.holding(value):
        model(**given).logits.square().mean().backward()
    ends = []
    for sign in (1, -1):
        moved = value.detach() + sign * torch.tensor([0, 1e-5, 0])
        with gate.holding(moved), torch.no_grad():
            ends.append(model(**given).logits.square().mean())
    torch.testing.assert_close(value.grad[1], (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("ranker", ["random", "magnitude", "gradient", "leave-one-out", "hybrid"])
def test_rankers_of_gates_and_weights_rank_blocks_too(ranker):
    model = deeper("llama")
    with torch.no_grad():
        for parameter in model.model.layers[1].parameters():
            parameter.mul_(1e-3 if parameter.ndim > 1 else 1)
    settings = {"of": {"gradient": 1.0, "block-influence": 2.0}} if ranker == "hybrid" else {}
    gates = prunekit.blocks(model)
    scores = gates.score(ranker, TOKENS, **settings)["model.layers"]
    assert scores.isfinite().all()
    assert ranker == "random" or scores.abs().argmin() == 1 or ranker == "hybrid"


def test_unequal_heads_follow_their_block_to_its_new_place(tmp_path):
    model = deeper("llama", num_key_value_heads=4)
    given = batch(model)
    heads = prunekit.heads(model)
    heads.gates["model.layers.2.self_attn"].keep[1] = False
    heads.finalize()
    heads.detach()
    gates = prunekit.blocks(model)
    gates.gates["model.layers"].keep[1] = False
    expected = valid_logits(model, given)
    done = gates.finalize()
    assert not done.stock
    assert getattr(model.config, KEPT_UNITS_KEY) == {
        "model.layers.0.self_attn": 4,
        "model.layers.1.self_attn": 3,
    }
    model.save_pretrained(tmp_path)
    assert torch.equal(valid_logits(prunekit.load(tmp_path), given), expected)


def test_refuses_what_no_config_or_weight_can_say():
    model = deeper("llama")
    gates = prunekit.blocks(model)
    gates.gate(0, 1, 0.5)
    with pytest.raises(ConfigError, match="gate of unit 1 is neither 0 nor 1"):
        gates.finalize()
    with pytest.raises(ConfigError, match="no linear that could be refitted reads blocks"):
        gates.finalize(TOKENS)
    with pytest.raises(ConfigError, match="obs: it ranks heads and neurons, not blocks"):
        gates.score("obs", TOKENS)
    model = deeper("gpt2", scale_attn_by_inverse_layer_idx=True)
    gates = prunekit.blocks(model)
    gates.gates["transformer.h"].keep[0] = False
    with pytest.raises(ShapeError, match=r"scaling is .* in its new place"):
        gates.finalize()
    gates = prunekit.blocks(randomized_model("modernbert"))
    gates.gates["model.layers"].keep[0] = False
    with pytest.raises(ShapeError, match="not every block has it"):
        gates.finalize()
