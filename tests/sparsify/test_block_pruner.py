"""Pruning blocks: exact counts, stored dtypes, steps, skipped and refused linears."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import prunekit
from prunekit.architectures import find_architecture
from prunekit.errors import NumericsError, ShapeError
from prunekit.models.layout import LinearSelection, list_blocks, stack_runners
from prunekit.models.orientation import weight_matrix
from tests.support.architectures import TINY, tiny
from tests.support.blocks import HALF, pruning
from tests.support.tiers import often

METHODS = ("magnitude", "random", "wanda", "ria", "sparsegpt")


pytestmark = pytest.mark.usefixtures("small_batches")


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def masks(model, entries):
    return {e["name"]: model.get_parameter(f"{e['name']}.weight") != 0 for e in entries}


@pytest.mark.parametrize("model_type", often(TINY))
@pytest.mark.parametrize(
    "section",
    [
        {"method": "wanda", "pattern": "2:4"},
        {"method": "sparsegpt", "propagation": "stage", **HALF},
    ],
    ids=["wanda", "sparsegpt"],
)
def test_every_declared_architecture_is_pruned_to_the_count(model_type, section, ids):
    model = tiny(model_type)
    before = weights(model)
    entries = prunekit.prune(model, ids, **section)
    linears = {f"{entry['name']}.weight" for entry in entries}
    found = find_architecture(model)
    assert len(entries) == sum(
        len(block.linears)
        for block in list_blocks(stack_runners(model, found), LinearSelection(_pattern("row")))
    )
    for entry in entries:
        module = model.get_submodule(entry["name"])
        kept = weight_matrix(module) != 0
        assert entry["shape"] == [*kept.shape]
        assert int(kept.sum()) * 2 == kept.numel()
        assert entry["sparsity"] == 0.5
        assert 0 < entry["relative_error"] < 1
        if section["pattern"] == "2:4":
            assert set(kept.unflatten(1, (-1, 4)).sum(2).flatten().tolist()) == {2}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in linears)


def _pattern(spelled):
    return prunekit.patterns.parse(spelled)


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_0_changes_no_byte(method, ids):
    model = tiny("llama").to(torch.bfloat16)
    before = weights(model)
    entries = prunekit.prune(model, ids, method=method, pattern="unstructured", sparsity=0)
    assert {(entry["sparsity"], entry["relative_error"]) for entry in entries} == {(0, 0)}
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.int16), before[name].view(torch.int16))


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_1_leaves_nothing(method, ids):
    model = tiny("llama")
    entries = prunekit.prune(model, ids, method=method, pattern="unstructured", sparsity=1)
    assert {entry["sparsity"] for entry in entries} == {1}
    for entry in entries:
        assert entry["relative_error"] in (0, pytest.approx(1))


@pytest.mark.parametrize("propagation", ["block", "stage"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_stored_is_what_the_block_goes_on_with(propagation, dtype, ids):
    model = tiny("llama")
    section = {"method": "sparsegpt", "propagation": propagation, "pattern": "2:4"}
    for visit, _, outcomes in pruning(model, ids, dtype=dtype, **section):
        for outcome in outcomes:
            assert outcome.weight.dtype == dtype
            module = visit.module.get_submodule(outcome.linear.path)
            assert torch.equal(module.weight, outcome.weight.float())
            assert int(outcome.weight.count_nonzero()) * 2 == outcome.weight.numel()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("propagation", ["block", "stage"])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_a_weight_that_is_nan_names_its_layer(model_type, propagation, method, ids):
    model = tiny(model_type)
    stack = find_architecture(model).stacks[0]
    path = stack.stages[-1].linears[0]
    block = stack_runners(model, find_architecture(model))[0].names[1]
    with torch.no_grad():
        model.get_submodule(f"{block}.{path}").weight[1, 2] = torch.nan
    with pytest.raises(NumericsError, match=rf"^{block}.{path}: 1 of its .*weights are NaN or inf"):
        prunekit.prune(model, ids, method=method, propagation=propagation, **HALF)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("propagation", ["block", "stage"])
def test_activations_that_are_all_zero_are_borne(method, propagation, ids):
    model = tiny("llama")
    nn.init.zeros_(model.model.embed_tokens.weight)
    entries = prunekit.prune(model, ids, method=method, pattern="2:4", propagation=propagation)
    assert {(entry["sparsity"], entry["relative_error"]) for entry in entries} == {(0.5, 0.0)}
    assert all(value.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5"])
def test_one_calibration_token_is_enough(method, model_type):
    model = tiny(model_type)
    entries = prunekit.prune(model, torch.tensor([[5]]), method=method, pattern="2:4")
    assert {entry["sparsity"] for entry in entries} == {0.5}
    assert all(value.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("propagation", ["block", "stage"])
@pytest.mark.parametrize("schedule", ["linear", "cubic"])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_steps_end_at_the_sparsity_that_one_step_gives(method, schedule, propagation, ids):
    model = tiny("llama")
    section = {"method": method, "propagation": propagation, "pattern": "unstructured"}
    steps = {"steps": 4, "schedule": schedule, "initial_sparsity": 0.2}
    entries = prunekit.prune(model, ids, sparsity=0.75, **section, **steps)
    assert {entry["sparsity"] for entry in entries} == {0.75}
    # The error is against the weights before the first step, not before the last.
    once = prunekit.prune(tiny("llama"), ids, sparsity=0.75, **section)
    errors = [sum(entry["relative_error"] for entry in found) for found in (entries, once)]
    assert errors[0] > 0.6 * errors[1]


def test_what_is_skipped_keeps_its_bytes(ids):
    model = tiny("llama")
    before = weights(model)
    entries = prunekit.prune(model, ids, pattern="2:4", skip=["*.o_proj", "model.layers.0.mlp.*"])
    names = {entry["name"] for entry in entries}
    assert len(names) == 9
    changed = {name for name, value in weights(model).items() if not value.equal(before[name])}
    assert changed == {f"{name}.weight" for name in names}


def test_what_a_pattern_does_not_divide_is_refused_or_skipped(ids):
    model = tiny("llama", intermediate_size=66)
    before = weights(model)
    with pytest.raises(ShapeError) as caught:
        prunekit.prune(model, ids, pattern="2:4")
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()[:2]] == [
        f"model.layers.{block}.mlp.down_proj" for block in range(2)
    ]
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    entries = prunekit.prune(model, ids, pattern="2:4", on_indivisible="skip")
    assert not any("down_proj" in entry["name"] for entry in entries)
    assert len(entries) == 12


class Untransposed(nn.Linear):
    """GPT-2's Conv1D as a plain linear."""

    def __init__(self, twin: Conv1D) -> None:
        super().__init__(*twin.weight.shape)
        self.weight.data, self.bias.data = twin.weight.data.T.contiguous(), twin.bias.data.clone()


@pytest.mark.parametrize("method", METHODS)
def test_a_conv1d_is_pruned_as_its_linear_twin(method, ids):
    model, twin = tiny("gpt2"), tiny("gpt2")
    for block in twin.transformer.h:
        for parent, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc")):
            setattr(parent, name, Untransposed(getattr(parent, name)))
        block.mlp.c_proj = Untransposed(block.mlp.c_proj)
    mine = prunekit.prune(model, ids, method=method, pattern="2:4")
    theirs = prunekit.prune(twin, ids, method=method, pattern="2:4")
    found, expected = masks(model, mine), masks(twin, theirs)
    assert [entry["shape"] for entry in mine] == [entry["shape"] for entry in theirs]
    assert mine[0]["shape"] == [96, 32]
    for name, mask in found.items():
        assert torch.equal(mask.T, expected[name])
        torch.testing.assert_close(
            model.get_parameter(f"{name}.weight").T, twin.get_parameter(f"{name}.weight")
        )


@pytest.mark.parametrize("allocation", ["uniform", "owl", "global"])
def test_allocations_keep_the_sparsity_of_the_whole(allocation, ids):
    model = tiny("llama")
    nn.init.normal_(model.model.layers[1].mlp.up_proj.weight, std=0.5)
    settings = {"method": "magnitude", "allocation": allocation, **HALF}
    entries = prunekit.prune(model, ids, **settings)
    sizes = [entry["shape"][0] * entry["shape"][1] for entry in entries]
    zeros = sum(entry["sparsity"] * size for entry, size in zip(entries, sizes, strict=True))
    assert zeros / sum(sizes) == pytest.approx(0.5, abs=0.01)
    assert (len({round(entry["sparsity"], 3) for entry in entries}) > 1) == (
        allocation != "uniform"
    )


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(ids):
    def once(**settings):
        model = tiny("llama")
        prunekit.prune(model, ids, method="random", pattern="2:4", **settings)
        return model.model.layers[0].mlp.up_proj.weight

    assert torch.equal(once(), once())
    assert not torch.equal(once(), once(random_seed=1))
