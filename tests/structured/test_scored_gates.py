"""Scoring and pruning by gates: reversible, and without a change of weights."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import prunekit
from prunekit.errors import ConfigError
from prunekit.structured.batches import mean_loss
from prunekit.structured.rankers.obs import BlockObs
from tests.support.adapters import PEFT_WARNS, adapted_model
from tests.support.units import batch, randomized_model, valid_logits

TOKENS = torch.randint(3, 96, (12, 10), generator=torch.Generator().manual_seed(4))


def test_prunes_exactly_what_was_asked_for_and_says_what():
    """Half and a quarter of all heads, returned as (layer, head, score)."""
    for sparsity, count in ((0.5, 4), (0.25, 2)):
        gates = prunekit.heads(randomized_model("gpt2"))
        scores = gates.score("magnitude")
        removed = gates.prune(scores, sparsity)
        assert len(removed) == count == 8 - gates.active()
        for layer, unit, score in removed:
            site = gates.linear_groups[layer].name
            assert not gates.keep[site][unit]
            assert score == scores[site][unit]


def test_rescoring_after_each_removal_sees_what_the_removed_ones_did():
    """Of two identical heads, the second matters once the first is removed."""
    model = randomized_model("gpt2")
    inner, outer = model.transformer.h[0].attn.c_attn, model.transformer.h[0].attn.c_proj
    with torch.no_grad():
        for third in (0, 32, 64):
            inner.weight[:, third + 8 : third + 16] = inner.weight[:, third : third + 8]
            inner.bias[third + 8 : third + 16] = inner.bias[third : third + 8]
        outer.weight[:16] *= 20
    gates = prunekit.heads(model)
    # The heads have equal outputs, so with a refit removing either one loses nothing.
    before = gates.score("obs", TOKENS, damping=1e-6)["transformer.h.0.attn"]
    gates.gates["transformer.h.0.attn"].keep[0] = False
    after = gates.score("obs", TOKENS, damping=1e-6)["transformer.h.0.attn"]
    assert before[1] < 1e-3 * after[1]


def test_in_steps_as_many_go_and_one_of_two_that_do_the_same_stays():
    """Stepwise pruning rescores, and so keeps one of two identical heads."""
    model = randomized_model("gpt2")
    given = batch(model)
    block = model.transformer.h[0].attn
    with torch.no_grad():
        for third in (0, 32, 64):
            part = block.c_attn.weight[:, third : third + 8]
            block.c_attn.weight[:, third + 8 : third + 16] = part
            block.c_attn.bias[third + 8 : third + 16] = block.c_attn.bias[third : third + 8]
        block.c_proj.weight[:16] *= 3
    dense = valid_logits(model, given)
    gates = prunekit.heads(model)
    ranker = BlockObs(damping=1e-6)
    at_once = gates.prune(gates.score(ranker, TOKENS), 0.25)
    assert {unit[:2] for unit in at_once} == {(0, 0), (0, 1)}
    gates.undo()
    in_steps = gates.prune_in_steps(ranker, TOKENS, 0.25, steps=2)
    assert len(in_steps) == 2
    assert len({(0, 0), (0, 1)} & {unit[:2] for unit in in_steps}) == 1
    gates.undo()
    assert torch.equal(valid_logits(model, given), dense)
    with pytest.raises(ConfigError, match="steps: 0"):
        gates.prune_in_steps(ranker, TOKENS, 0.25, steps=0)
    with pytest.raises(ConfigError, match="Ask for less"):
        gates.prune_in_steps(ranker, TOKENS, 0.9, steps=3)
    assert gates.active() == 8


def test_pruning_the_worst_heads_by_leave_one_out_costs_least():
    """Leave-one-out beats its reversed ranking on its own calibration data."""
    model = randomized_model("gpt2")
    gates = prunekit.heads(model)
    scores = gates.score("leave-one-out", TOKENS)
    found = []
    for sign in (1, -1):
        gates.prune({name: sign * score for name, score in scores.items()}, 0.25)
        found.append(mean_loss(model, [{"input_ids": TOKENS}]))
        gates.undo()
    assert found[0] < found[1]


def test_on_a_trained_model_rankers_that_look_at_the_loss_beat_random(shared):
    """Pruning raises the loss, and loss-based rankers raise it less than random."""
    model = prunekit.load(shared / "models/stories260K")
    torch.manual_seed(0)
    start = torch.ones(8, 1, dtype=torch.int64)
    ids = model.generate(start, do_sample=True, max_new_tokens=63, pad_token_id=0)
    heads = prunekit.heads(model)
    dense = mean_loss(model, [{"input_ids": ids}])

    def loss_after_pruning(scores):
        assert len(heads.prune(scores, 0.1)) == 2
        found = mean_loss(model, [{"input_ids": ids}])
        heads.undo()
        return found

    chance = [loss_after_pruning(heads.score("random", seed=seed)) for seed in range(5)]
    assert all(found > dense for found in chance)
    for ranker in ("gradient", "leave-one-out"):
        assert loss_after_pruning(heads.score(ranker, ids)) < sum(chance) / len(chance), ranker


def test_a_model_in_training_is_in_training_after_it_was_scored():
    model = randomized_model("llama").train()
    prunekit.heads(model).score("gradient", TOKENS)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_sparsity_of_less_than_half_a_unit_is_refused_as_it_prunes_none(scope):
    gates = prunekit.heads(randomized_model("gpt2"))
    scores = gates.score("magnitude")
    with pytest.raises(ConfigError, match=r"of 8 heads 0\.05 prunes none"):
        gates.prune(scores, 0.05, scope=scope)
    with pytest.raises(ConfigError, match="prunes none"):
        gates.prune(scores, 0.4, round_to=32)
    with pytest.raises(ConfigError, match="nothing is left to take back"):
        gates.undo()
    assert gates.prune(scores, 0.0) == []
    assert len(gates.prune(scores, 0.13)) == 1


def test_weights_in_flat_tensors_are_not_scored(monkeypatch):
    """As FSDP 1 and ZeRO-3 keep them: each process would score its own part."""
    model = randomized_model("llama")
    gates = prunekit.heads(model)
    monkeypatch.setattr(model.lm_head.weight, "ds_id", 1, raising=False)
    with pytest.raises(ConfigError, match="score: FSDP 1 and ZeRO-3 keep weights in flat tensors"):
        gates.score("magnitude")


@pytest.mark.filterwarnings(*PEFT_WARNS)
def test_adapters_sharded_by_fsdp_2_are_scored_as_whole_ones(tmp_path):
    expected = prunekit.neurons(adapted_model("llama")).score("magnitude")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = adapted_model("llama")
        fully_shard(model.base_model.model, mesh=init_device_mesh("cpu", (1,)))
        found = prunekit.neurons(model).score("magnitude")
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(found[name], score) for name, score in expected.items())
