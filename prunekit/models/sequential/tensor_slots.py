"""Storage of cached tensors that reuses freed slots."""

from torch import Size, Tensor

from prunekit.models.sequential.hidden_states import HiddenStatesFactory

Key = tuple[str, int]
"""Kind of the tensor and number of its batch."""


class TensorSlots:
    """A mapping of keys to tensors in reusable slots.

    The slot of a removed tensor is used by the next tensor of its shape.

    Args:
        new_hidden_states: Makes the empty storage: on the device, in main memory, or on disk.
    """

    def __init__(self, new_hidden_states: HiddenStatesFactory) -> None:
        self._storage = new_hidden_states()
        self._slots: dict[Key, int] = {}
        self._free: dict[Size, list[int]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._slots

    def put(self, key: Key, value: Tensor) -> None:
        """Store a copy, since the caller may change the tensor afterwards."""
        self.pop(key)
        if free := self._free.get(value.shape):
            self._slots[key] = free.pop()
            self._storage[self._slots[key]] = value.clone()
        else:
            self._slots[key] = len(self._storage)
            self._storage.extend([value.clone()])

    def get(self, key: Key) -> Tensor:
        """Return a copy."""
        value = self._storage[self._slots[key]]
        return value.clone() if isinstance(self._storage, list) else value

    def pop(self, key: Key) -> Tensor | None:
        """Remove and return a tensor; None if there is none."""
        if key not in self._slots:
            return None
        slot = self._slots.pop(key)
        value = self._storage[slot]
        self._free.setdefault(value.shape, []).append(slot)
        if isinstance(self._storage, list):
            self._storage[slot] = value.new_empty(0)
        return value
