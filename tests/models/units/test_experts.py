"""Experts as units: closed ones get no token, and removed ones leave what the gates computed."""

import pytest
import torch

import prunekit
from prunekit.errors import CheckpointError, ShapeError
from prunekit.models.experts import unfuse
from prunekit.models.units.experts import expert_groups
from tests.support.architectures import tiny
from tests.support.tiers import often
from tests.support.units import batch, randomized_model, valid_logits

CAN = ("deepseek_v3", "gpt_oss", "granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "dbrx")
GROUPED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}


def close_all_but(gates, keep):
    for group in gates.groups:
        gates.gates[group.name].keep[:] = False
        gates.gates[group.name].keep[keep] = True


@pytest.mark.parametrize("model_type", often(CAN, ("dbrx", "gpt_oss", "mixtral")))
def test_a_model_without_experts_answers_as_the_gated_one_and_opens_as_stock(model_type, tmp_path):
    model = randomized_model(model_type)
    given = batch(model)
    dense = valid_logits(model, given)
    gates = prunekit.experts(model)
    gone = 2 * sum(float(group.costs[0]) for group in gates.groups)
    before = model.num_parameters()
    assert torch.equal(valid_logits(model, given), dense)
    close_all_but(gates, [0, 3])
    expected = valid_logits(model, given)
    assert (expected - dense).abs().max() > 1e-3 * dense.abs().max()
    done = gates.finalize()
    found = valid_logits(model, given)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert done.stock
    assert model.num_parameters() == before - gone
    model.save_pretrained(tmp_path)
    opened, loaded = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loaded.values())
    assert torch.equal(valid_logits(opened.eval(), given), found)


def test_tokens_of_a_closed_expert_go_to_the_others():
    model = randomized_model("mixtral")
    gates, chosen = prunekit.experts(model), []
    gates.groups[0].module.register_forward_pre_hook(lambda _, given: chosen.append(given[1:]))
    given = batch(model)
    model(**given)
    gates.gate(0, 1, 0.0)
    model(**given)
    (before, _), (after, shares) = chosen
    assert (before == 1).any()
    assert not (after == 1).any()
    assert after.shape == before.shape
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))


def test_the_model_is_as_before_after_a_forward_that_fails():
    model = randomized_model("mixtral")
    gates, given = prunekit.experts(model), batch(model)
    dense = valid_logits(model, given)
    close_all_but(gates, [0, 1, 2])
    handle = gates.groups[1].module.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**given)
    handle.remove()
    gates.detach()
    assert torch.equal(valid_logits(model, given), dense)


def test_too_few_experts_are_refused_before_and_when_they_run():
    model = randomized_model("mixtral")
    gates = prunekit.experts(model)
    scores = {group.name: torch.arange(4.0) for group in gates.groups}
    with pytest.raises(ShapeError, match="1 experts would be left, and each token takes 2"):
        gates.prune(scores, 0.75, scope="layer")
    assert not gates.closed
    close_all_but(gates, [2])
    with pytest.raises(ShapeError, match="each token takes 2"):
        model(**batch(model))
    with pytest.raises(ShapeError, match="each token takes 2"):
        gates.finalize()


def test_unequal_numbers_are_refused_with_the_way_out():
    gates = prunekit.experts(randomized_model("mixtral"))
    gates.gates[gates.groups[0].name].keep[0] = False
    with pytest.raises(ShapeError, match=r'from 3 to 4.*scope = "layer"'):
        gates.finalize()


def test_of_each_group_of_a_router_equally_many_are_pruned(tmp_path):
    """DeepSeek's router chooses groups of experts first."""
    model = randomized_model("deepseek_v3", **GROUPED)
    gates, given = prunekit.experts(model), batch(model)
    (group,) = gates.groups
    assert group.unit_multiple(1) == 2
    scores = {group.name: torch.tensor([0.1, 0.2, 0.3, 0.4, 5.0, 6.0, 7.0, 8.0])}
    removed = gates.prune(scores, 0.4, scope="layer")  # 3 of 8, of which the kept are rounded up
    assert [(each.unit, each.score) for each in removed] == [(4, 5.0), (0, pytest.approx(0.1))]
    gates.prune(scores, 0.5, scope="layer")
    assert gates.kept[group.name] == [2, 3, 6, 7]
    expected = valid_logits(model, given)
    gates.finalize()
    assert torch.equal(valid_logits(model, given), expected)
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(valid_logits(opened, given), expected)
    gates.gate(0, 1, 0.0)
    with pytest.raises(ShapeError, match="from 1 to 2 open ones"):
        model(**given)


def test_the_linears_of_an_empty_model_are_the_same_units():
    fused, linears = tiny("mixtral"), tiny("mixtral")
    unfuse(linears)
    for one, other in zip(expert_groups(fused), expert_groups(linears), strict=True):
        assert one.name == other.name
        assert torch.equal(one.costs, other.costs)
        other.narrow([1, 3])
        assert [*other.module._modules][-2:] == ["0", "1"]


def test_models_whose_experts_cannot_be_closed_are_refused_with_the_reason():
    with pytest.raises(CheckpointError, match="its blocks have no experts"):
        expert_groups(tiny("llama"))
    with pytest.raises(ShapeError, match="more than a row for each expert"):
        expert_groups(tiny("longcat_flash"))
    with pytest.raises(ShapeError, match="called with the tokens of all experts"):
        expert_groups(tiny("llama4_text"))
