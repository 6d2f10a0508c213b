"""Removal: smaller matrices, the answers of the gated model, and folders that open again."""

import json
import os
import subprocess
import sys

import pytest
import torch

import prunekit
from prunekit.errors import CheckpointError, ShapeError
from prunekit.models.units.heads_neurons import sites
from prunekit.models.units.removal import RECORD, apply_removal, parameters
from prunekit.models.units.stock_config import stock_entries
from prunekit.structured.gate import Gate
from tests.conftest import ROOT
from tests.support.architectures import TINY
from tests.support.units import AS_DEEP, answers, batch, needs_interface, restless

CANNOT_SAY = ("bert", "distilbert", "gpt2", "gpt_neox", "opt", "roberta")
STOCK_HEADS = sorted(set(TINY) - {*CANNOT_SAY})


def pruned(model, kind, *, uniform):
    """Close about half of the units, and return what each site keeps."""
    kept = {}
    for index, site in enumerate(sites(model, kind)):
        # T5's stacks share a bias, so that a stock model keeps the same heads in all blocks.
        generator = torch.Generator().manual_seed(0 if uniform else index)
        count = max(1, site.units // 2 + (0 if uniform else (0, 1, 1)[index % 3]))
        kept[site.name] = torch.randperm(site.units, generator=generator)[:count].sort()[0].tolist()
    return kept


def gated_answers(model, kind, kept, given):
    gates = [Gate(site) for site in sites(model, kind)]
    for site, gate in zip(sites(model, kind), gates, strict=True):
        gate.keep[:] = False
        gate.keep[kept[site.name]] = True
    found = answers(model, given)
    for gate in gates:
        gate.detach()
    return found


def assert_same(actual, expected):
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "unequal"])
@pytest.mark.parametrize("model_type", sorted(TINY))
def test_a_smaller_model_answers_as_the_gated_one(model_type, uniform):
    """Rows, columns and biases of every family, the other way in GPT-2, and T5's position bias."""
    model = restless(model_type)
    needs_interface(model)
    given = batch(model)
    dense = answers(model, given)
    for kind in ("heads", "neurons"):
        kept = pruned(model, kind, uniform=uniform)
        expected = gated_answers(model, kind, kept, given)
        assert (expected - dense).abs().max() > 1e-2 * dense.abs().max()
        before = parameters(model)
        gone = sum(
            site.parameters * (site.units - len(kept[site.name])) for site in sites(model, kind)
        )
        apply_removal(model, sites(model, kind), kept, None)
        assert_same(answers(model, given), expected)
        assert parameters(model) == before - gone > 0


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_a_uniform_model_is_a_stock_one(model_type, tmp_path):
    """Config rewritten; where a family's config cannot say fewer heads, neurons alone go."""
    model = restless(model_type)
    given = batch(model)
    for kind in ("heads", "neurons") if model_type in STOCK_HEADS else ("neurons",):
        kept = pruned(model, kind, uniform=True)
        apply_removal(
            model, sites(model, kind), kept, stock_entries(model, sites(model, kind), kept)
        )
    assert not hasattr(model.config, RECORD)
    assert model.config._attn_implementation in {"sdpa", "eager"}
    model.save_pretrained(tmp_path)
    for opened in (type(model).from_pretrained(tmp_path), prunekit.load(tmp_path)):
        assert torch.equal(answers(opened.eval(), given), answers(model, given))


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2", "llama", "phi3", "t5"])
def test_a_folder_of_unequal_blocks_opens_again_and_writes_text(model_type, tmp_path):
    model = restless(model_type, **AS_DEEP.get(model_type, {}))
    needs_interface(model)
    given = batch(model)
    for kind in ("heads", "neurons"):
        kept = pruned(model, kind, uniform=False)
        apply_removal(model, sites(model, kind), kept, None)
    model.save_pretrained(tmp_path)
    opened = prunekit.load(tmp_path)
    # As prunekit is imported here, transformers opens it too.
    for other in (opened, type(model).from_pretrained(tmp_path).eval()):
        assert torch.equal(answers(other, given), answers(model, given))
    prompt = {"input_ids": given["input_ids"][1:]}
    written = [m.generate(**prompt, max_new_tokens=5, do_sample=False) for m in (model, opened)]
    assert torch.equal(*written)


@pytest.mark.parametrize("model_type", CANNOT_SAY)
def test_a_config_that_cannot_say_fewer_heads_is_refused_with_the_reason(model_type):
    model = restless(model_type)
    found = sites(model, "heads")
    with pytest.raises(
        ShapeError, match=f"{model_type}.*hidden size divided by the number of heads"
    ):
        stock_entries(model, found, pruned(model, "heads", uniform=True))


def test_a_stock_config_is_refused_for_unequal_blocks_and_for_heads_that_differ_under_one_bias():
    model = restless("llama")
    with pytest.raises(ShapeError, match=r'keep from 32 to 33.*Choose scope = "layer"'):
        stock_entries(model, sites(model, "neurons"), pruned(model, "neurons", uniform=False))
    model = restless("t5")
    kept = pruned(model, "heads", uniform=True)
    kept["encoder.block.1.layer.0.SelfAttention"] = [0, 1]
    kept["encoder.block.0.layer.0.SelfAttention"] = [1, 2]
    with pytest.raises(ShapeError, match="share one position bias"):
        stock_entries(model, sites(model, "heads"), kept)


def test_a_stock_config_is_refused_where_transformers_itself_refuses_it():
    """Llama wants a hidden size that the number of heads divides, though each has its own size."""
    model = restless("llama", num_key_value_heads=4)
    kept = {site.name: [0, 1, 2] for site in sites(model, "heads")}
    with pytest.raises(ShapeError, match=r"num_attention_heads = 3.*not a multiple"):
        stock_entries(model, sites(model, "heads"), kept)


def test_removing_in_two_steps_is_removing_at_once():
    """Also of heads with a bias, whose columns are counted as the first block once had them."""
    once, twice = restless("t5"), restless("t5")
    needs_interface(once)
    given = batch(once)
    steps = [[0, 2, 3], [1, 2]]
    for model, choices in ((once, [[2, 3]]), (twice, steps)):
        for choice in choices:
            found = sites(model, "heads")
            apply_removal(model, found, {site.name: choice for site in found}, None)
    assert torch.equal(answers(once, given), answers(twice, given))
    assert once.config.to_dict() == twice.config.to_dict()


def test_load_keeps_two_matrices_apart_that_the_config_calls_tied(tmp_path):
    model = restless("t5")
    needs_interface(model)
    given = batch(model)
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().flip(0).clone())
    kept = pruned(model, "heads", uniform=False)
    apply_removal(model, sites(model, "heads"), kept, None)
    model.save_pretrained(tmp_path)
    opened = prunekit.load(tmp_path)
    assert torch.equal(answers(opened, given), answers(model, given))
    assert opened.lm_head.weight is not opened.shared.weight
    restless("t5").save_pretrained(tmp_path / "tied")
    opened = prunekit.load(tmp_path / "tied")
    assert opened.lm_head.weight is opened.shared.weight


def test_load_refuses_a_class_that_transformers_does_not_have(tmp_path):
    restless("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["MyModel"]}))
    with pytest.raises(CheckpointError, match="architectures names 'MyModel'"):
        prunekit.load(tmp_path)


FRESH = """
import sys, torch
folder, how = sys.argv[1:]
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


@pytest.mark.slow
@pytest.mark.parametrize("how", ["prunekit", "stock"])
def test_opens_in_a_fresh_process_with_the_same_logits_and_text(how, tmp_path):
    model = restless("llama")
    for kind in ("heads", "neurons"):
        found = sites(model, kind)
        kept = pruned(model, kind, uniform=how == "stock")
        entries = stock_entries(model, found, kept) if how == "stock" else None
        apply_removal(model, found, kept, entries)
    model.save_pretrained(tmp_path)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path), how],
        check=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": path},
    )
    logits, text = torch.load(tmp_path / "answers.pt")
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        assert torch.equal(logits, model(ids).logits)
        assert torch.equal(text, model.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.slow
def test_without_prunekit_a_folder_of_unequal_blocks_is_refused(tmp_path):
    model = restless("llama")
    apply_removal(model, sites(model, "neurons"), pruned(model, "neurons", uniform=False), None)
    model.save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, str(tmp_path), "stock"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode != 0
    assert "size mismatch" in done.stderr or "mismatched" in done.stderr
    assert not (tmp_path / "answers.pt").exists()
