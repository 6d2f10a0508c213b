"""Gate sets: setting, closing, reactivating, undoing and relocating gates."""

import copy
import io
import math

import pytest
import torch

import prunekit
from prunekit.errors import ConfigError
from prunekit.structured.unit_gates import Gates
from tests.support.units import batch, randomized_model, valid_logits

TOKENS = torch.randint(3, 96, (12, 10), generator=torch.Generator().manual_seed(4))


def test_each_step_can_be_taken_back_and_units_come_back_as_they_were():
    model = randomized_model("llama")
    given = batch(model)
    dense = valid_logits(model, given)
    gates = prunekit.heads(model)
    gates.gate(0, 1, 0.5)
    soft = valid_logits(model, given)
    removed = gates.prune(gates.score("random"), 0.5)
    closed = valid_logits(model, given)
    gates.reactivate([unit[:2] for unit in removed])
    assert torch.equal(valid_logits(model, given), soft)
    assert not torch.equal(soft, dense)
    gates.undo()
    assert torch.equal(valid_logits(model, given), closed)
    gates.undo()
    assert torch.equal(valid_logits(model, given), soft)
    gates.undo()
    assert torch.equal(valid_logits(model, given), dense)
    with pytest.raises(ConfigError, match="nothing is left to take back"):
        gates.undo()


def test_a_gate_that_is_trained_can_be_set_by_hand_and_goes_on_being_trained():
    """torch refuses in-place changes of trainable leaves outside ``no_grad``."""
    model = randomized_model("llama")
    gates = prunekit.heads(model)
    value = next(iter(gates.gates.values())).value.requires_grad_()
    gates.gate(0, 1, 0.001)
    assert value.tolist() == [1, pytest.approx(0.001)]
    model(TOKENS, labels=TOKENS).loss.backward()
    assert value.grad is not None
    assert bool((value.grad != 0).all())


def test_gates_can_be_closed_at_once_and_follow_their_units_when_blocks_go():
    model = randomized_model("llama", num_hidden_layers=3)
    given = batch(model)
    dense = valid_logits(model, given)
    neurons, blocks = prunekit.neurons(model), prunekit.blocks(model)
    neurons.gate(2, 5, 0.5)
    soft = valid_logits(model, given)
    neurons.close({place.name: torch.arange(64) > 20 for place in neurons.groups})
    closed = valid_logits(model, given)
    neurons.undo()
    assert torch.equal(valid_logits(model, given), soft)
    neurons.undo()
    assert torch.equal(valid_logits(model, given), dense)
    neurons.gate(2, 5, 0.5)
    neurons.close({place.name: torch.arange(64) > 20 for place in neurons.groups})
    assert torch.equal(valid_logits(model, given), closed)
    blocks.gates["model.layers"].keep[1] = False
    expected = valid_logits(model, given)
    blocks.finalize()
    assert neurons.relocate() == {
        "model.layers.0.mlp.down_proj": "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj": "model.layers.2.mlp.down_proj",
    }
    assert torch.equal(valid_logits(model, given), expected)
    assert neurons.gates["model.layers.1.mlp.down_proj"].value[5] == 0.5


def test_active_units_are_those_above_the_threshold():
    gates = prunekit.heads(randomized_model("bert"))
    gates.gate(0, 0, 0.005)
    gates.gate(0, 1, 0.05)
    assert gates.active() == 7
    assert gates.active(0.1) == 6


def test_refuses_units_that_are_not_there():
    gates = prunekit.heads(randomized_model("bert"))
    with pytest.raises(ConfigError, match=r"\(2, 0\): there is no such unit; layers go to 1"):
        gates.gate(2, 0, 0.5)
    with pytest.raises(ConfigError, match=r"\(0, 4\).*units to 3"):
        gates.reactivate([(0, 4)])


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, "x", None, torch.ones(3)], ids=str
)
def test_a_factor_is_a_finite_number(value):
    gates = prunekit.heads(randomized_model("llama"))
    with pytest.raises(ConfigError, match="is not a finite number"):
        gates.gate(0, 0, value)
    next(iter(gates.gates.values())).value[1] = math.nan
    with pytest.raises(ConfigError, match="gate of unit 1 is not a finite number"):
        gates.finalize()


def test_units_are_named_by_whole_numbers():
    gates = prunekit.heads(randomized_model("llama"))
    for unit in ((0.0, 0), ("a", 0), (0, None)):
        with pytest.raises(ConfigError, match="layer and unit are whole numbers"):
            gates.gate(*unit, 0.5)
    for units in (3, [3], None):
        with pytest.raises(ConfigError, match=r"are not pairs \(layer, unit\)"):
            gates.reactivate(units)
    name, gate = next(iter(gates.gates.items()))
    for keep in (None, {}, gates.keep | {name: torch.ones(9) > 0}, gates.keep | {name: gate.value}):
        with pytest.raises(ConfigError, match=f"keep: {name} needs a tensor of bool with"):
            gates.close(keep)
    with pytest.raises(ConfigError, match="nothing is left to take back"):
        gates.undo()


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", ["heads", "neurons", "blocks", "hidden"])
@pytest.mark.parametrize("other", [copy.deepcopy, saved_and_loaded])
def test_a_copy_of_a_model_has_gates_of_its_own(kind, other):
    model = randomized_model("llama")
    given = batch(model)
    gates = getattr(prunekit, kind)(model)
    gates.gate(0, 1, 0.0)
    gated = valid_logits(model, given)
    twin = other(model)
    of_twin = getattr(prunekit, kind)(twin)
    assert of_twin is not gates
    assert torch.equal(valid_logits(twin, given), gated)
    gates.gate(0, 0, 0.5)
    assert torch.equal(valid_logits(twin, given), gated)
    of_twin.detach()
    assert not torch.equal(valid_logits(twin, given), gated)
    gates.undo()
    assert torch.equal(valid_logits(model, given), gated)


def test_a_model_has_one_set_of_gates_of_a_kind():
    model = randomized_model("llama")
    gates = prunekit.heads(model)
    assert prunekit.heads(model) is gates
    assert prunekit.neurons(model) is not gates
    with pytest.raises(ConfigError, match="the model has gates on them already"):
        Gates(model, "heads")
    gates.detach()
    assert prunekit.heads(model) is not gates


def test_masks_and_counts_are_those_of_the_moment():
    gates = prunekit.heads(randomized_model("llama"))
    keep = gates.keep
    gates.prune(gates.score("random"), 0.5)
    assert all(bool(mask.all()) for mask in keep.values())
    assert (gates.units, gates.closed) == (4, 2)
