"""Optimizers follow parameters that are replaced by smaller ones."""

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import prunekit
from prunekit.errors import ConfigError
from prunekit.training.masks import keep_masks
from tests.support.units import (
    EQUAL_DEPTH,
    batch,
    randomized_model,
    skip_without_attention_interface,
    valid_logits,
)

GRADIENT, MOMENT = 3.0, 2.0
CASES = [
    *((family, kind) for family in ("llama", "gpt2") for kind in ("heads", "neurons", "blocks")),
    ("t5", "heads"),
    ("t5", "blocks"),
    ("llama", "hidden"),
    ("qwen2", "hidden"),
]


def trained_model(family, kind, optimizer_class=torch.optim.AdamW, **settings):
    """Return a model after a step, its gates, batch and optimizer.

    Each gradient and each moment is a multiple of the parameter, element by element, so that parts
    that belong to each other are known by their values.
    """
    tied = {"tie_word_embeddings": True} if family == "qwen2" else {}
    model = randomized_model(family, **EQUAL_DEPTH.get(family, {}), **tied)
    given = batch(model)
    (frozen := model.get_input_embeddings().weight).requires_grad_(kind == "hidden")
    trained = [each for each in model.parameters() if each.requires_grad]
    vectors = [each for each in trained if each.ndim == 1]
    matrices = [each for each in trained if each.ndim > 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = optimizer_class(groups, lr=1e-3, **settings)
    labels = {} if "labels" in given else {"labels": given["input_ids"]}
    model(**given, **labels).loss.backward()
    optimizer.step()
    assert frozen.grad is None or kind == "hidden"
    for parameter in trained:
        if parameter.grad is not None:
            parameter.grad = GRADIENT * parameter.detach()
            for value in optimizer.state[parameter].values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    value.copy_(MOMENT * parameter.detach())
    return model, getattr(prunekit, kind)(model), given, optimizer


def close_some(gates):
    """Close different units in each group, but the same number."""
    for index, group in enumerate(gates.groups):
        gates.gates[group.name].keep[index % 2 :: 2] = False


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_moments_and_gradients_of_what_is_left_are_those_of_before(family, kind):
    model, gates, _, optimizer = trained_model(family, kind)
    if family == "t5":
        skip_without_attention_interface(model)
    rescaled = {id(norm.weight) for norm in getattr(gates.groups[0], "norms", ())}
    names = {id(each): name for name, each in model.named_parameters()}
    before = [[names[id(each)] for each in group["params"]] for group in optimizer.param_groups]
    frozen = {name for name, each in model.named_parameters() if not each.requires_grad}
    norms = {names[id(norm)] for norm in model.parameters() if id(norm) in rescaled}
    groups = list(optimizer.param_groups)
    close_some(gates)
    gates.finalize(optimizer=optimizer)
    left = dict(model.named_parameters())
    assert {name for name, each in left.items() if not each.requires_grad} == frozen & left.keys()
    for group, old, names_before in zip(optimizer.param_groups, groups, before, strict=True):
        assert group is old
        if kind != "blocks":  # blocks that follow a removed one have its names
            assert [id(each) for each in group["params"]] == [id(left[n]) for n in names_before]
    trained = [each for group in optimizer.param_groups for each in group["params"]]
    assert {*map(id, trained)} == {id(each) for each in left.values() if each.requires_grad}
    assert {*map(id, optimizer.state)} <= {*map(id, trained)}
    assert any(each.ndim > 1 for each in optimizer.state)
    for name, parameter in left.items():
        if name in norms or parameter not in optimizer.state:
            continue
        state = optimizer.state[parameter]
        assert state["step"] == 1
        for value, factor in (
            (parameter.grad, GRADIENT), (state["exp_avg"], MOMENT), (state["exp_avg_sq"], MOMENT)
        ):  # fmt: skip
            torch.testing.assert_close(value, factor * parameter.detach(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("optimizer_class", "settings", "names"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, {"momentum_buffer"}),
        (torch.optim.AdamW, {"amsgrad": True}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (torch.optim.NAdam, {}, {"exp_avg", "exp_avg_sq"}),
        (torch.optim.Adagrad, {}, {"sum"}),
    ],
)
def test_every_tensor_of_the_state_is_cut_along_the_same_axis(optimizer_class, settings, names):
    model, gates, _, optimizer = trained_model("llama", "neurons", optimizer_class, **settings)
    close_some(gates)
    gates.finalize(optimizer=optimizer)
    weight = model.model.layers[1].mlp.down_proj.weight
    assert weight.shape == (32, 32)
    state = optimizer.state[weight]
    found = {name for name, value in state.items() if torch.is_tensor(value) and value.ndim}
    assert found == names
    for name in names:
        assert torch.equal(state[name], MOMENT * weight)


@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [(torch.optim.AdamW, {"weight_decay": 0.1}), (torch.optim.SGD, {"momentum": 0.9})],
)
def test_a_cut_model_trains_on_as_the_gated_one_would(optimizer_class, settings):
    """Neither is the optimizer restarted, nor is any parameter left out."""
    model = randomized_model("llama")
    given = batch(model)
    optimizer = optimizer_class(model.parameters(), lr=1e-3, **settings)

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(**given, labels=given["input_ids"]).loss.backward()
            optimizer.step()

    train(model, optimizer, 3)
    gates = prunekit.neurons(model)
    gates.prune(gates.score("magnitude"), 0.4)
    gated = copy.deepcopy(model)
    other = optimizer_class(gated.parameters(), lr=1e-3, **settings)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with prunekit.neurons(gated).hold(other):
        train(gated, other, 5)
    gates.finalize(optimizer=optimizer)
    before = {name: each.clone() for name, each in model.named_parameters()}
    train(model, optimizer, 5)
    assert not [name for name, each in model.named_parameters() if torch.equal(each, before[name])]
    expected = valid_logits(gated, given)
    assert (valid_logits(model, given) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_optimizer_in_use_has_to_be_passed_and_one_that_was_deleted_has_not():
    model = randomized_model("llama")
    gates = prunekit.heads(model)
    gates.prune(gates.score("random"), 0.5)
    before = dict(model.named_parameters())
    first = torch.optim.AdamW(model.lm_head.parameters())
    second = torch.optim.SGD(model.model.parameters())
    with pytest.raises(ConfigError, match="AdamW and SGD, in use, trains parameters"):
        gates.finalize()
    with pytest.raises(ConfigError, match="optimizer: SGD, in use"):
        gates.finalize(optimizer=first)
    other = torch.optim.SGD(randomized_model("gpt2").parameters())
    with pytest.raises(ConfigError, match="the SGD trains no parameter of this model"):
        gates.finalize(optimizer=[first, second, other])
    with pytest.raises(ConfigError, match=r"optimizer: a str is not a torch\.optim\.Optimizer"):
        gates.finalize(optimizer="AdamW")
    assert {id(each) for each in before.values()} == {id(each) for each in model.parameters()}
    gates.finalize(optimizer=[first, second])
    del first, second
    neurons = prunekit.neurons(model)
    neurons.prune(neurons.score("random"), 0.5)
    neurons.finalize()


def test_a_wrapped_optimizer_is_followed():
    model = randomized_model("llama")
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters()))
    gates = prunekit.heads(model)
    with gates.hold(optimizer):
        gates.prune(gates.score("random"), 0.5)
        gates.finalize(optimizer=optimizer)
    trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert trained == {id(each) for each in model.parameters()}


def test_state_of_another_shape_is_refused():
    model, gates, _, optimizer = trained_model("llama", "heads", torch.optim.Adafactor)
    close_some(gates)
    before = {id(each) for each in model.parameters()}
    with pytest.raises(ConfigError, match=r"Adafactor has the state row_var \(shape \[\d+, 1\]\)"):
        gates.finalize(optimizer=optimizer)
    assert {id(each) for each in model.parameters()} == before


def test_hooks_on_gradients_are_refused_since_new_parameters_would_not_have_them():
    model = randomized_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0
    gates = prunekit.heads(model)
    gates.prune(gates.score("random"), 0.5)
    with keep_masks(model), pytest.raises(ConfigError, match="such as those of keep_masks"):
        gates.finalize()
    gates.finalize()


def test_factors_that_were_trained_leave_the_optimizer_with_their_gates():
    model = randomized_model("llama")
    given = batch(model)
    gates = prunekit.neurons(model)
    values = [gate.value.requires_grad_() for gate in gates.gates.values()]
    optimizer = torch.optim.AdamW([{"params": [*model.parameters()]}, {"params": values}], lr=0.01)
    model(**given, labels=given["input_ids"]).loss.backward()
    optimizer.step()
    expected = valid_logits(model, given)
    gates.finalize(optimizer=optimizer)
    assert optimizer.param_groups[1]["params"] == []
    assert len(optimizer.state) == len([*model.parameters()])
    assert (valid_logits(model, given) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture
def one_process(tmp_path):
    """Return with a process group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_model_under_ddp_is_cut_between_two_wrappers():
    model = randomized_model("llama")
    given = batch(model)
    gates = prunekit.heads(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(wrapper):
        optimizer.zero_grad()
        wrapper(**given, labels=given["input_ids"]).loss.backward()
        optimizer.step()

    wrapper = DistributedDataParallel(model)
    with gates.during(optimizer, "gradient", given["input_ids"], sparsity=0.5, end=1) as pruner:
        step(wrapper)
        step(wrapper)
    assert pruner.achieved == 0.5
    expected = valid_logits(model, given)
    gates.finalize(optimizer=optimizer)
    assert (valid_logits(model, given) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ConfigError, match=r"Wrap the model again, on all processes"):
        step(wrapper)
    before = {name: each.clone() for name, each in model.named_parameters()}
    step(DistributedDataParallel(wrapper.module))
    assert not [name for name, each in model.named_parameters() if torch.equal(each, before[name])]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("how", ["fsdp", "fsdp2", "zero3", "zero1"])
def test_sharded_weights_are_not_cut(how, monkeypatch):
    model = randomized_model("llama")
    gates = prunekit.heads(model)
    gates.prune(gates.score("random"), 0.5)
    wrapper = model
    if how == "fsdp":
        whole = ShardingStrategy.NO_SHARD  # of one process
        wrapper = FullyShardedDataParallel(
            model, sharding_strategy=whole, device_id=torch.device("cpu")
        )
    elif how == "fsdp2":
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    else:
        name = {"zero3": "ds_id", "zero1": "_hp_mapping"}[how]
        monkeypatch.setattr(model.lm_head.weight, name, 1, raising=False)
    with pytest.raises(ConfigError, match="Train on with the gates closed"):
        gates.finalize()
    assert wrapper is not None
