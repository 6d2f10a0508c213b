"""Slots of cached tensors: copying and reuse of freed storage."""

import pytest
import torch

from prunekit.models.sequential.hidden_states import MmapStates
from prunekit.models.sequential.tensor_slots import TensorSlots

CPU = torch.device("cpu")


@pytest.fixture(params=["list", "disk"])
def storages(request, tmp_path):
    """Return the list of storages that slots create, and its factory function."""
    made = []

    def make():
        made.append([] if request.param == "list" else MmapStates(CPU, tmp_path))
        return made[-1]

    return made, make


def test_returns_copies(storages):
    slots, value = TensorSlots(storages[1]), torch.randn(3, 4)
    expected = value.clone()
    slots.put(("output", 0), value)
    value.zero_()
    slots.get(("output", 0)).zero_()
    assert torch.equal(slots.get(("output", 0)), expected)


def test_a_new_value_replaces_the_old_one(storages):
    slots = TensorSlots(storages[1])
    for number in range(3):
        slots.put(("output", 0), torch.full((2,), float(number)))
    assert slots.pop(("output", 0)).tolist() == [2, 2]
    assert ("output", 0) not in slots
    assert slots.pop(("output", 0)) is None


def test_freed_storage_serves_the_next_tensor_of_its_shape(storages):
    made, make = storages
    slots = TensorSlots(make)
    for batch in range(4):
        slots.put(("input", batch), torch.ones(2, 3) * batch)
    for batch in range(4):
        assert slots.pop(("input", batch)).eq(batch).all()
        slots.put(("output", batch), torch.ones(2, 3) * -batch)
    assert len(made[0]) == 4
    slots.pop(("output", 0))
    slots.put(("output", 0), torch.ones(5))  # of a different shape
    assert len(made[0]) == 5
    assert all(slots.get(("output", batch)).eq(-batch).all() for batch in range(1, 4))
