"""Neurons of undeclared model types, found by following single features through a forward."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

import prunekit
from prunekit.architectures import FeedForward, find_architecture
from prunekit.architectures.attention_trace import storage_id
from prunekit.architectures.probed_feed_forwards import (
    PointwiseTrace,
    Sources,
    find_entry,
    find_feed_forwards,
    remove_last_neuron,
)
from tests.support.units import batch, randomized_model, valid_logits

KNOWN = {
    "olmo2": ("mlp.gate_proj", "mlp.up_proj"),
    "glm": ("mlp.gate_up_proj",),
    "phi": ("mlp.fc1",),
    "bloom": ("mlp.dense_h_to_4h",),
    "deepseek_v3": None,
}


class FeedForwards(nn.Module):
    """One block; ``between`` computes the neurons from the outputs of two linears."""

    def __init__(self, between):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({
            "gate": nn.Linear(8, 12), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8),
        })])  # fmt: skip
        self.between = between

    def forward(self, x):
        block = self.blocks[0]
        return block["down"](self.between(block["gate"](x), block["up"](x)))


def found(between) -> list[FeedForward]:
    with FakeTensorMode(), torch.no_grad():
        model, trace = FeedForwards(between), PointwiseTrace()
        linears = {
            name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)
        }
        for name, linear in linears.items():
            linear.register_forward_hook(lambda _, x, y, name=name: trace.note(name, x[0], y))
        matrices = {storage_id(linear.weight) for linear in linears.values()}
        with Sources(trace, lambda x: storage_id(x) in matrices):
            model(torch.empty(1, 4, 8))
        return [*find_feed_forwards(model, "blocks", trace, ())]


def test_pointwise_operations_keep_neurons_apart():
    both = [FeedForward(("gate", "up"), "down")]
    assert found(lambda gate, up: nn.functional.silu(gate) * up) == both
    assert found(lambda gate, up: gate.relu().square().view(4, 12) * up.view(-1, 12) + 1) == both
    assert found(lambda gate, up: torch.where(gate > 0, up.half().float(), gate)) == both
    assert found(lambda gate, _: gate.tanh()) == [FeedForward(("gate",), "down")]


@pytest.mark.parametrize(
    "between",
    [
        lambda gate, up: gate.softmax(-1) * up,
        lambda gate, up: gate * up.mean(-1, keepdim=True),
        lambda gate, up: nn.functional.layer_norm(gate * up, (12,)),
        lambda gate, up: gate * up.flip(-1),
        lambda gate, up: torch.cat([gate[..., :6], up[..., :6]], -1),
        lambda gate, up: gate.cumsum(-1) * up,
        lambda gate, up: gate * up * (gate.sum() > 0),
    ],
    ids=["softmax", "mean", "norm", "flip", "halves", "sum of those before", "condition"],
)
def test_what_mixes_neurons_rules_them_out(between):
    assert found(between) == []


@pytest.mark.parametrize("model_type", [name for name in KNOWN if KNOWN[name]])
def test_neurons_of_a_probed_type_go_as_those_of_a_declared_one(model_type, tmp_path):
    model = randomized_model(model_type)
    (declared,) = find_architecture(model).stacks[0].feed_forwards
    assert declared.inputs == KNOWN[model_type]
    given = batch(model)
    gates = prunekit.neurons(model)
    for index, place in enumerate(gates.groups):
        gates.gates[place.name].keep[index :: 3 + index] = False
    expected = valid_logits(model, given)
    gates.finalize()
    found = valid_logits(model, given)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.save_pretrained(tmp_path)
    assert torch.equal(valid_logits(prunekit.load(tmp_path), given), found)


def test_equally_many_neurons_are_a_stock_folder(tmp_path):
    model = randomized_model("olmo2")
    given, gates = batch(model), prunekit.neurons(model)
    for place in gates.groups:
        gates.gates[place.name].keep[2:5] = False
    assert gates.finalize().stock
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(valid_logits(opened, given), valid_logits(model, given))


def test_dense_blocks_and_shared_experts_of_a_mixture_have_neurons():
    gates = prunekit.neurons(randomized_model("deepseek_v3"))
    names = {place.name.split(".", 3)[3] for place in gates.groups}
    assert names == {"mlp.down_proj", "mlp.shared_experts.down_proj"}


def test_the_entry_is_the_usual_one_with_that_number():
    config = PreTrainedConfig()
    assert find_entry(config, 12) == ""
    config.moe_intermediate_size, config.ffn_dim = 12, 13
    assert find_entry(config, 12) == "moe_intermediate_size"
    assert find_entry(config, 13) == "ffn_dim"
    config.n_inner = None
    assert find_entry(config, 14) == "n_inner"


def test_what_was_removed_for_the_trial_is_given_back():
    model = FeedForwards(None)
    parts = model.blocks[0]
    before = {name: each.shape for name, each in model.named_parameters()}
    undo = [*remove_last_neuron(model.blocks, [FeedForward(("gate", "up"), "down")])]
    assert parts["gate"].weight.shape == (11, 8)
    assert parts["up"].bias.shape == (11,)
    assert parts["down"].weight.shape == (8, 11)
    for linear, name, value in undo:
        setattr(linear, name, value)
    assert {name: each.shape for name, each in model.named_parameters()} == before
