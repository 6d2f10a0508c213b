"""State of a training as a file: trees of numbers, texts and tensors."""

import math

import pytest
import torch

from prunekit.errors import CheckpointError, ConfigError
from prunekit.training.measure import Measure
from prunekit.training.recover import recover
from prunekit.training.saved_state import read_state, restore_training, write_state
from tests.support.architectures import tiny


def test_a_tree_is_read_as_it_was_written(tmp_path):
    half = torch.tensor([1.0, -0.0], dtype=torch.bfloat16)
    tree = {
        "step": 3, "lowest": math.inf, "loss": 0.1 + 0.2, "none": None, "empty": {}, "no": [],
        "weights": {"a.b": half, "c/d": torch.tensor(7.0, dtype=torch.float64)},
        "list": [torch.tensor([True, False]), "text", {"deep": torch.arange(6).view(2, 3).T}],
    }  # fmt: skip
    write_state(tmp_path / "state.safetensors", tree)
    found = read_state(tmp_path / "state.safetensors")
    assert {key: found[key] for key in list(tree)[:6]} == {key: tree[key] for key in list(tree)[:6]}
    assert found["weights"]["a.b"].view(torch.int16).equal(half.view(torch.int16))
    assert found["weights"]["c/d"].dtype == torch.float64
    assert found["list"][0].tolist() == [True, False]
    assert found["list"][1] == "text"
    assert found["list"][2]["deep"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_another_file_is_refused(tmp_path, content):
    file = tmp_path / "state.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match="not the state of a training"):
        read_state(file)


def test_a_state_of_another_training_is_refused():
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    measure = Measure(model, [], gates=[], pruning=None, ranks=None, settings=None)  # pyright: ignore
    with pytest.raises(ConfigError, match="state: it is of another training"):
        restore_training(optimizer, measure, {"weights": {}})


class Memory:
    """A log in memory that saves after one step."""

    def __init__(self, at, state=None):
        self.at, self.state, self.saved, self.records = at, state, None, []

    def add(self, step):
        self.records.append(step.step)

    def save(self, step, state, *, is_measured):
        if step == self.at:
            self.saved = copied(state())


def copied(value):
    """Return a deep copy of a tree."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return [copied(part) for part in value] if isinstance(value, list) else value


def test_a_loop_in_python_goes_on_from_a_state_too():
    from prunekit.config.train_table import Train

    ids = torch.randint(3, 90, (8, 9), generator=torch.Generator().manual_seed(1))
    settings = Train(steps=7, rate=1e-2, batch=3, every=3)
    whole, log = tiny("gpt2"), Memory(4)
    list(recover(whole, ids, ids[:2], settings, log=log))
    assert log.records == [0, 3, 6, 7]
    later, again = tiny("gpt2"), Memory(None, log.saved)
    found = [*recover(later, ids, ids[:2], settings, log=again)]
    assert [each.step for each in found] == [6, 7]
    assert again.state is None
    for one, other in zip(whole.parameters(), later.parameters(), strict=True):
        assert torch.equal(one, other)
