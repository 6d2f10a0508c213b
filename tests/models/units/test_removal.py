"""Removal: smaller matrices, the gated model's output, and reloadable folders."""

import pytest
import torch

import prunekit
from prunekit.checkpoint.compressed import KEPT_UNITS_KEY
from prunekit.models.units.heads_neurons import linear_groups
from prunekit.models.units.removal import apply_removal, count_parameters
from prunekit.models.units.stock_config import stock_entries
from prunekit.structured.gate import Gate
from tests.support.architectures import TINY
from tests.support.tiers import often
from tests.support.units import (
    EQUAL_DEPTH,
    batch,
    random_kept,
    randomized_model,
    skip_without_attention_interface,
    valid_logits,
)

CANNOT_SAY = ("bert", "distilbert", "gpt2", "gpt_neox", "opt", "roberta")
STOCK_HEADS = sorted(set(TINY) - {*CANNOT_SAY})


def gated_logits(model, kind, kept, given):
    gates = [Gate(site) for site in linear_groups(model, kind)]
    for site, gate in zip(linear_groups(model, kind), gates, strict=True):
        gate.keep[:] = False
        gate.keep[kept[site.name]] = True
    found = valid_logits(model, given)
    for gate in gates:
        gate.detach()
    return found


def assert_same(actual, expected):
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "unequal"])
@pytest.mark.parametrize("model_type", often(sorted(TINY)))
def test_a_smaller_model_answers_as_the_gated_one(model_type, uniform):
    """Covers each family's rows, columns and biases, GPT-2's Conv1D, T5's position bias."""
    model = randomized_model(model_type)
    skip_without_attention_interface(model)
    given = batch(model)
    dense = valid_logits(model, given)
    for kind in ("heads", "neurons"):
        kept = random_kept(model, kind, uniform=uniform)
        expected = gated_logits(model, kind, kept, given)
        assert (expected - dense).abs().max() > 1e-2 * dense.abs().max()
        before = count_parameters(model)
        gone = sum(
            site.parameters_per_unit * (site.units - len(kept[site.name]))
            for site in linear_groups(model, kind)
        )
        apply_removal(model, linear_groups(model, kind), kept, None)
        assert_same(valid_logits(model, given), expected)
        assert count_parameters(model) == before - gone > 0


@pytest.mark.parametrize("model_type", often(sorted(TINY)))
def test_a_uniform_model_is_a_stock_one(model_type, tmp_path):
    """The rewritten config describes a stock model.

    For families whose config cannot express fewer heads, only neurons are removed.
    """
    model = randomized_model(model_type)
    given = batch(model)
    for kind in ("heads", "neurons") if model_type in STOCK_HEADS else ("neurons",):
        kept = random_kept(model, kind, uniform=True)
        apply_removal(
            model,
            linear_groups(model, kind),
            kept,
            stock_entries(model, linear_groups(model, kind), kept),
        )
    assert not hasattr(model.config, KEPT_UNITS_KEY)
    assert model.config._attn_implementation in {"sdpa", "eager"}
    model.save_pretrained(tmp_path)
    for opened in (type(model).from_pretrained(tmp_path), prunekit.load(tmp_path)):
        assert torch.equal(valid_logits(opened.eval(), given), valid_logits(model, given))


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2", "llama", "phi3", "t5"])
def test_a_folder_of_unequal_blocks_opens_again_and_writes_text(model_type, tmp_path):
    model = randomized_model(model_type, **EQUAL_DEPTH.get(model_type, {}))
    skip_without_attention_interface(model)
    given = batch(model)
    for kind in ("heads", "neurons"):
        kept = random_kept(model, kind, uniform=False)
        apply_removal(model, linear_groups(model, kind), kept, None)
    model.save_pretrained(tmp_path)
    opened = prunekit.load(tmp_path)
    # With prunekit imported, transformers loads it too.
    for other in (opened, type(model).from_pretrained(tmp_path).eval()):
        assert torch.equal(valid_logits(other, given), valid_logits(model, given))
    prompt = {"input_ids": given["input_ids"][1:]}
    written = [m.generate(**prompt, max_new_tokens=5, do_sample=False) for m in (model, opened)]
    assert torch.equal(*written)


def test_removing_in_two_steps_is_removing_at_once():
    """Position bias columns keep the first block's original numbering."""
    once, twice = randomized_model("t5"), randomized_model("t5")
    skip_without_attention_interface(once)
    given = batch(once)
    steps = [[0, 2, 3], [1, 2]]
    for model, choices in ((once, [[2, 3]]), (twice, steps)):
        for choice in choices:
            found = linear_groups(model, "heads")
            apply_removal(model, found, {site.name: choice for site in found}, None)
    assert torch.equal(valid_logits(once, given), valid_logits(twice, given))
    assert once.config.to_dict() == twice.config.to_dict()


def test_load_keeps_two_matrices_apart_that_the_config_calls_tied(tmp_path):
    model = randomized_model("t5")
    skip_without_attention_interface(model)
    given = batch(model)
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().flip(0).clone())
    kept = random_kept(model, "heads", uniform=False)
    apply_removal(model, linear_groups(model, "heads"), kept, None)
    model.save_pretrained(tmp_path)
    opened = prunekit.load(tmp_path)
    assert torch.equal(valid_logits(opened, given), valid_logits(model, given))
    assert opened.lm_head.weight is not opened.shared.weight
    randomized_model("t5").save_pretrained(tmp_path / "tied")
    opened = prunekit.load(tmp_path / "tied")
    assert opened.lm_head.weight is opened.shared.weight


OPEN = """
import sys, torch
folder, how = arguments
if how == "prunekit":
    import prunekit
    model = prunekit.load(folder)
else:
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
ids = torch.arange(3, 12)[None]
with torch.inference_mode():
    torch.save([model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)],
               folder + "/answers.pt")
assert how == "prunekit" or "prunekit" not in sys.modules
"""


@pytest.mark.parametrize("how", ["prunekit", "stock"])
def test_opens_in_another_process_with_the_same_logits_and_text(how, tmp_path, stock_server):
    model = randomized_model("llama")
    for kind in ("heads", "neurons"):
        found = linear_groups(model, kind)
        kept = random_kept(model, kind, uniform=how == "stock")
        entries = stock_entries(model, found, kept) if how == "stock" else None
        apply_removal(model, found, kept, entries)
    model.save_pretrained(tmp_path)
    stock_server.start(tmp_path / "said", 1, OPEN, tmp_path, how).succeed()
    logits, text = torch.load(tmp_path / "answers.pt")
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        assert torch.equal(logits, model(ids).logits)
        assert torch.equal(text, model.generate(ids, max_new_tokens=4, do_sample=False))


def test_without_prunekit_a_folder_of_unequal_blocks_is_refused(tmp_path, stock_server):
    model = randomized_model("llama")
    apply_removal(
        model, linear_groups(model, "neurons"), random_kept(model, "neurons", uniform=False), None
    )
    model.save_pretrained(tmp_path)
    world = stock_server.start(tmp_path / "said", 1, OPEN, tmp_path, "stock")
    assert world.wait() != [0]
    assert "size mismatch" in world.stderr(0) or "mismatched" in world.stderr(0)
    assert not (tmp_path / "answers.pt").exists()
