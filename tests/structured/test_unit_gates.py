"""Removal of units as a whole or not at all; public functions that return gates."""

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode
from typing_extensions import override

import prunekit
from prunekit.errors import ConfigError
from tests.support.tiers import often
from tests.support.units import EQUAL_DEPTH, batch, randomized_model, valid_logits

TOKENS = torch.randint(3, 96, (4, 10), generator=torch.Generator().manual_seed(4))


class FailAt(TorchFunctionMode):
    """Lets the n-th call of torch fail."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    @override
    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if not self.left:
            raise MemoryError("injected")
        return function(*args, **(kwargs or {}))


def everything(model, gates, optimizer):
    """Return all that a removal may change: values, and the identity of objects."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors |= {f"{name}.value": gate.value for name, gate in gates.gates.items()}
    tensors |= {f"{name}.keep": gate.keep for name, gate in gates.gates.items()}
    for number, state in enumerate(optimizer.state.values()):
        tensors |= {f"{number}.{name}": value for name, value in state.items()}
    numbers = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | str | list | tuple)
    }
    params = [each for group in optimizer.param_groups for each in group["params"]]
    return {
        "bits": {name: each.detach().clone() for name, each in tensors.items()},
        "numbers": copy.deepcopy(numbers),
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "identities": [*map(id, tensors.values()), *map(id, params), *map(id, optimizer.state)],
        "gates": [id(gates.groups), id(gates.gates), len(gates._history), vars(model).keys()],
    }


def assert_same(found, expected):
    bits, wanted = found.pop("bits"), expected.pop("bits")
    assert found == expected
    assert bits.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(bits[name], value), name


@pytest.mark.parametrize(
    ("family", "kind", "data"),
    [
        ("llama", "heads", None),
        ("llama", "neurons", TOKENS),
        ("llama", "blocks", None),
        ("llama", "hidden", None),
        ("gpt2", "neurons", None),
        ("t5", "heads", None),
    ],
)
@pytest.mark.parametrize("places", often([3, 7], [3]))
def test_a_failure_at_any_stage_leaves_everything_as_it_was(family, kind, data, places):
    """Failures are injected at calls of torch that are evenly spread over the removal."""
    model = randomized_model(family, **EQUAL_DEPTH.get(family, {}))
    given = batch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    labels = {} if "labels" in given else {"labels": given["input_ids"]}
    model(**given, **labels).loss.backward()
    optimizer.step()
    gates = getattr(prunekit, kind)(model)
    gates.prune(gates.score("magnitude"), 0.5, scope="layer")
    if kind in {"heads", "neurons"}:
        gates.gate(0, 0, 0.5)
        gates.reactivate([(1, unit) for unit in range(gates.groups[1].units)])  # layers differ
    before, logits = everything(model, gates, optimizer), valid_logits(model, given)
    twin = copy.deepcopy((model, optimizer))
    with FailAt(0) as calls:
        getattr(prunekit, kind)(twin[0]).finalize(data, optimizer=twin[1])
    numbers = range(1, -calls.left, -calls.left // places)
    assert len(numbers) >= places
    for number in numbers:
        with pytest.raises(MemoryError, match="injected"), FailAt(number):
            gates.finalize(data, optimizer=optimizer)
        assert_same(everything(model, gates, optimizer), copy.copy(before))
    assert torch.equal(valid_logits(model, given), logits)
    gates.finalize(data, optimizer=optimizer)
    if data is None:
        assert (valid_logits(model, given) - logits).abs().max() <= 1e-5 * logits.abs().max()


@pytest.mark.parametrize("kind", ["blocks", "hidden"])
def test_a_model_without_any_blocks_or_coordinates_is_refused(kind):
    gates = getattr(prunekit, kind)(randomized_model("llama"))
    name = gates.groups[-1].name
    gates.gates[name].keep[:] = False
    with pytest.raises(ConfigError, match=f"{name}: all of its .* {kind} are pruned"):
        gates.finalize()
