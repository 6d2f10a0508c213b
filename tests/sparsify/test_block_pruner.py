"""Pruning a model block by block: what is measured, what is changed, what the next layer sees."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import prunekit
from prunekit.architectures import find_architecture
from prunekit.config.prune_table import Prune
from prunekit.data.tokens import calibration_tokens
from prunekit.errors import ConfigError, NumericsError, ShapeError
from prunekit.models.layout import LinearSelection, list_blocks, read_weight, stack_runners
from prunekit.models.orientation import weight_matrix
from prunekit.models.sequential import pipeline
from prunekit.models.sequential.pipeline import batches, iterate_blocks
from prunekit.sparsify.block_pruner import BlockPruner
from prunekit.sparsify.error import relative_error
from prunekit.sparsify.recipe import Recipe
from prunekit.statistics import Gram, StageStatistics
from tests.support import checkpoints
from tests.support.architectures import TINY, tiny
from tests.support.checkpoints import planned

HALF = {"pattern": "unstructured", "sparsity": 0.5}
METHODS = ("magnitude", "random", "wanda", "ria", "sparsegpt")


@pytest.fixture
def ids():
    return torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Let samples come in several batches, the last one smaller."""
    monkeypatch.setitem(pipeline.BATCH_TOKENS, "cpu", 36)


def pruning(model, ids, *, dtype=None, **section):
    """Yield each visit of a walk with its block and the outcomes, which prune when asked for."""
    recipe = Recipe.of(Prune.model_validate({"method": "wanda", **section}), calibrated=True)
    stacks = stack_runners(model, find_architecture(model))
    blocks = list_blocks(stacks, LinearSelection(recipe.pattern))
    names = [linear.name for block in blocks for linear in block.linears]
    sparsity = section.get("sparsity", 0.5)
    kinds = {name: dtype or model.get_parameter(f"{name}.weight").dtype for name in names}
    pruner = BlockPruner(recipe, dict.fromkeys(names, sparsity), kinds)
    walked = iterate_blocks(model, stacks, None, batches(ids, torch.device("cpu")))
    for visit, block in zip(walked, blocks, strict=True):
        yield visit, block, pruner.prune(visit, block)


def all_entries(*arguments, **settings):
    return [outcome.as_record() for *_, found in pruning(*arguments, **settings) for outcome in found]


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def masks(model, entries):
    return {e["name"]: model.get_parameter(f"{e['name']}.weight") != 0 for e in entries}


@pytest.mark.parametrize("model_type", TINY)
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
        len(block.linears) for block in list_blocks(stack_runners(model, found), LinearSelection(_pattern("row")))
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


def exact_error(inputs, dense, pruned):
    """Return ‖WX − W′X‖² / ‖WX‖² in float64."""
    x = torch.cat([part.flatten(0, -2) for part in inputs]).double()
    dense, pruned = dense.double(), pruned.double()
    return float((x @ (dense - pruned).T).square().sum() / (x @ dense.T).square().sum())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5"])
def test_relative_error_is_that_of_the_outputs(model_type, method, ids):
    """By block: the inputs are those of the dense block behind the pruned blocks before it.

    A method that needs no Gram matrix is judged by one sample in four.
    """
    model = tiny(model_type)
    checked = 0
    section = {"method": method, "pattern": "2:4", "propagation": "block"}
    for visit, block, outcomes in pruning(model, ids, **section):
        inputs, dense, hooks = {}, {}, []
        for linear in block.linears:
            module = visit.module.get_submodule(linear.path)
            dense[linear] = read_weight(visit.module, linear)
            inputs[linear] = []
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, into=inputs[linear]: into.append(args[0])
                )
            )
        visit.run()
        for hook in hooks:
            hook.remove()
        for outcome in outcomes:
            linear = outcome.linear
            looked = [torch.cat(inputs[linear])[:: 4 if method == "wanda" else 1]]
            expected = exact_error(looked, dense[linear], read_weight(visit.module, linear))
            assert outcome.as_record()["relative_error"] == pytest.approx(expected, rel=1e-4)
            checked += 1
    assert checked >= 8


def test_by_stage_the_next_stage_reads_what_the_pruned_ones_give(ids):
    """Cut at the first stage, by stage nothing reaches the second; by block all of it does."""

    def energies(propagation):
        model = tiny("llama")
        recipe = {"method": "wanda", "propagation": propagation, "pattern": "unstructured"}
        return {
            outcome.as_record()["name"].rpartition(".")[2]: outcome.as_record()["relative_error"]
            for *_, outcomes in pruning(model, ids, sparsity=1.0, **recipe)
            for outcome in outcomes
        }

    assert energies("stage")["o_proj"] == 0
    assert energies("block")["o_proj"] == pytest.approx(1)


@pytest.mark.parametrize("propagation", ["block", "stage"])
def test_the_next_block_reads_what_the_pruned_one_gives(propagation, ids):
    model = tiny("llama")
    last = None
    for visit, _, outcomes in pruning(model, ids, propagation=propagation, pattern="2:4"):
        if last is not None:
            for mine, theirs in zip(visit.hidden, last, strict=True):
                assert torch.equal(mine, theirs)
        # By stage hidden states change on the way.
        bound = [visit.runner.bind(visit.index, hidden.clone(), {}) for hidden in visit.hidden]
        list(outcomes)
        with torch.inference_mode():
            last = [call() for call in bound]


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


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("propagation", ["block", "stage"])
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "t5", "bert"])
def test_an_activation_that_is_nan_names_layer_and_sample(model_type, propagation, value, ids):
    model = tiny(model_type)
    ids[4, 3] = 77
    with torch.no_grad():
        model.get_input_embeddings().weight[77, 5] = value
    with pytest.raises(NumericsError) as caught:
        prunekit.prune(model, ids, method="wanda", propagation=propagation, **HALF)
    first = find_architecture(model).stacks[0].stages[0].linears[0]
    name = f"{stack_runners(model, find_architecture(model))[0].names[0]}.{first}"
    assert str(caught.value) == f"{name}: its input is NaN or inf in calibration sample 4."


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@pytest.mark.parametrize("propagation", ["block", "stage"])
def test_an_activation_that_overflows_within_a_block_names_layer_and_sample(
    model_type, propagation, ids
):
    model = tiny(model_type)
    path = {"llama": "mlp.down_proj", "opt": "fc2"}[model_type]
    block = stack_runners(model, find_architecture(model))[0].blocks[0]
    hit = block.get_submodule({"llama": "mlp.act_fn", "opt": "activation_fn"}[model_type])

    def blow(_, args, out):
        """Let the first sample of the batch of two overflow, be its tokens flat or not."""
        flat = out.reshape(-1, out.shape[-1]).clone()
        if len(flat) == 2 * ids.shape[1]:
            flat[: ids.shape[1]] = torch.inf
        return flat.view_as(out)

    hit.register_forward_hook(blow)
    with pytest.raises(NumericsError, match=rf"0.{path}: its input .* calibration sample 4\.$"):
        prunekit.prune(model, ids, method="wanda", propagation=propagation, **HALF)


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


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("propagation", ["block", "stage"])
def test_a_model_in_memory_is_pruned_as_its_checkpoint_is(
    tmp_path, model_type, propagation, monkeypatch
):
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")
    folder = checkpoints.write(tmp_path / "m", model_type)
    prune = {"method": "sparsegpt", "pattern": "2:4", "propagation": propagation}
    plan = planned(folder, tmp_path / "out", prune=prune)
    *_, finish = prunekit.run(plan)
    model = tiny(model_type)
    sources = plan.config.calibration.data
    tokens = calibration_tokens(checkpoints.tokenizer(), sources, 4, 12, 0)
    entries = prunekit.prune(model, tokens.ids, **prune)
    written = checkpoints.tensors(tmp_path / "out")
    for layer, entry in zip(finish.values["layers"], entries, strict=True):
        assert layer["relative_error"] == entry["relative_error"]
        weight = model.get_parameter(f"{entry['name']}.weight")
        assert torch.equal(weight, written[layer["tensor"]])


@pytest.mark.parametrize("model_type", ["llama", "t5", "bert"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_model_in_memory_is_left_as_it_was_found(model_type, fails, ids):
    model = tiny(model_type).train()
    frozen = model.get_input_embeddings().eval()
    configs = [module.config.to_dict() for module in model.modules() if hasattr(module, "config")]
    modules, hooks = list(model.named_modules()), _hooks(model)
    if fails:
        with torch.no_grad():
            model.get_input_embeddings().weight[ids[0, 0]] = torch.nan
        with pytest.raises(NumericsError):
            prunekit.prune(model, ids, pattern="2:4")
    else:
        prunekit.prune(model, ids, pattern="2:4")
    assert {module for module in model.modules() if not module.training} == {frozen}
    assert configs == [m.config.to_dict() for m in model.modules() if hasattr(m, "config")]
    assert (list(model.named_modules()), _hooks(model)) == (modules, hooks)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not torch.is_inference_mode_enabled()
    if not fails:
        model(input_ids=ids, labels=ids).loss.backward()


def _hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_a_method_that_looks_at_weights_alone_needs_no_tokens(ids):
    model = tiny("llama")
    entries = prunekit.prune(model, method="magnitude", pattern="2:4")
    assert {entry["sparsity"] for entry in entries} == {0.5}
    assert {entry["relative_error"] for entry in entries} == {None}
    with pytest.raises(ConfigError, match=r"^method wanda: needs calibration tokens"):
        prunekit.prune(model, method="wanda", pattern="2:4")
    with pytest.raises(ConfigError, match="needs calibration tokens"):
        prunekit.prune(model, method="magnitude", allocation="owl", **HALF)


def test_a_setting_that_cannot_be_meant_is_refused(ids):
    with pytest.raises(ConfigError, match=r"sparsity.*fixes the sparsity"):
        prunekit.prune(tiny("llama"), ids, pattern="2:4", sparsity=0.5)
    with pytest.raises(ConfigError, match="damping"):
        prunekit.prune(tiny("llama"), ids, method="wanda", pattern="2:4", damping=0.1)


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


def test_no_error_is_reported_where_no_gram_matrix_was_gathered(ids):
    entries = prunekit.prune(tiny("llama"), ids, method="wanda", pattern="2:4", measure_error=False)
    assert {entry["relative_error"] for entry in entries} == {None}
    assert relative_error(torch.ones(2, 2), torch.ones(2, 2), StageStatistics([])) is None
    gram = Gram(2)
    assert relative_error(torch.ones(2, 2), torch.zeros(2, 2), StageStatistics([gram])) is None
    gram.update(torch.zeros(1, 2))
    assert relative_error(torch.ones(2, 2), torch.zeros(2, 2), StageStatistics([gram])) == 0.0


def test_a_forward_that_shows_a_stage_ends_there(ids):
    """Stage by stage, the neurons run for the stage that reads them and once to go on.

    And twice on one sample, to see what the block does with what attention gives.
    """
    model, calls = tiny("llama"), []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(0))
    all_entries(model, ids, method="sparsegpt", propagation="stage", **HALF)
    assert len(calls) == 3 * len(batches(ids, torch.device("cpu"))) + 2
