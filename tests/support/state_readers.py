"""Readers of files that a training leaves: gates on units, and the masks of a pruner."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import prunekit
from prunekit.training import callback
from tests.support.architectures import tiny
from tests.support.watched import replace_file, result

FILE = "state.safetensors"


def gates(folder: Path, content: bytes) -> None:
    """Load gates; they are those of the file, or as before."""
    file, neurons = folder / FILE, _neurons()
    replace_file(file, content)
    before = neurons.state()
    if result(folder, lambda: neurons.gates.load(file) or True):
        stored, found = load_file(file), neurons.state()
        assert found.keys() == stored.keys()
        for key, value in found.items():
            assert value.view(torch.uint8).equal(stored[key].view(torch.uint8)), key
            assert value.isfinite().all(), key
            assert value.dtype != torch.bool or value.view(torch.uint8).max() <= 1, key
        neurons.gates.undo()
    for key, value in neurons.state().items():
        assert value.equal(before[key]), key


def pruner(folder: Path, content: bytes) -> None:
    """Load the state of a pruner beside a Trainer's checkpoint."""
    file, gradual = folder / FILE, _pruner()
    replace_file(file, content)
    before = gradual.masks.packed()
    if found := result(folder, callback.read_state, file):
        loaded = result(folder, lambda: gradual.load_state_dict(found) or True)
        after = gradual.masks.packed()
        for name, bits in before.items():
            assert after[name].equal(found["bits"][name] if loaded else bits), name


READERS: dict[str, Callable[[Path, bytes], None]] = {"gates": gates, "pruner": pruner}


class _Neurons:
    """Gates on the neurons of a tiny model."""

    def __init__(self) -> None:
        self.gates = prunekit.neurons(tiny("llama"))
        self.gates.prune(self.gates.score("magnitude"), 0.25)
        self.gates.gate(0, 1, 0.5)

    def state(self) -> dict[str, torch.Tensor]:
        """Return masks and factors by their names in a file."""
        return {
            f"neurons/{name}/{part}": getattr(gate, part).detach().clone()
            for name, gate in self.gates.gates.items()
            for part in ("keep", "value")
        }


_neurons = cache(_Neurons)


@cache
def _pruner() -> Any:
    """Return a pruner in the middle of its schedule."""
    model = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    gradual = prunekit.GradualPruner(model, optimizer, sparsity=0.5, end=4, every=2)
    for _ in range(2):
        model(input_ids=torch.arange(3, 11).view(1, 8)).logits.sum().backward()
        optimizer.step()
    return gradual


def seeds(folder: Path) -> dict[str, list[bytes]]:
    """Return valid files of each reader; ``folder`` is a place to write them."""
    file = folder / FILE
    _neurons().gates.save(file)
    saved = {"gates": [file.read_bytes()]}
    callback.write_state(_pruner(), file)
    saved["pruner"] = [file.read_bytes()]
    file.unlink()
    return saved
