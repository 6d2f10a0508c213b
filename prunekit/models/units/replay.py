"""A removal of units replayed on tensors that are stored elsewhere.

Units are removed from a model without weights, and the steps are recorded. Each tensor of the
smaller model then follows from one of the whole model, wherever its values are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.models.units.narrowing import Narrowing, Step


@dataclass(frozen=True)
class Replay:
    """Derivation of a smaller model's tensor from the whole model's.

    Attributes:
        steps: The steps in their order.
        dtype: Type in which values are changed.
        value: The tensor itself, where it follows from the new config alone.
    """

    steps: tuple[Step, ...]
    dtype: torch.dtype
    value: Tensor | None = None

    @property
    def is_trivial(self) -> bool:
        """Whether the tensor is that of the whole model."""
        return not self.steps and self.value is None

    def of(self, whole: Tensor) -> Tensor:
        """Return the tensor of the smaller model.

        It has the data type of ``whole``, unless its values are changed.
        """
        if self.value is not None:
            return self.value
        part, changed = whole, None
        for step in self.steps:
            if isinstance(step, Narrowing):
                part = step.of(part)
                changed = None if changed is None else step.of(changed)
            else:
                changed = part.to(self.dtype, copy=True) if changed is None else changed
                step.change(changed)
        return part if changed is None else unless_equal(part, changed, self.dtype)

    def put_back(self, part: Tensor) -> Tensor:
        """Return a tensor of the whole model, 0 outside of its part."""
        for step in reversed(self.steps):
            assert isinstance(step, Narrowing)
            part = step.put_back(part)
        return part


def unless_equal(stored: Tensor, value: Tensor, computed: torch.dtype) -> Tensor:
    """Return ``stored`` if the value is only its rounding, else ``value``.

    Args:
        stored: A tensor as stored, in any data type.
        value: The tensor as a run leaves it.
        computed: Type to which it was rounded when it was loaded.
    """
    return stored if torch.equal(stored.to(computed).to(value.dtype), value) else value


def replays(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    steps: Iterable[Step],
    dtype: torch.dtype,
) -> dict[str, Replay]:
    """Return the replay of each tensor of the smaller model.

    Keys are its names there.

    Args:
        before: Parameters and stored buffers of the whole model.
        after: Those of the smaller model.
        steps: Recorded steps of the removal.
        dtype: Type in which values are changed.
    """
    found: dict[int, tuple[Step, ...]] = {id(tensor): () for tensor in before.values()}
    for step in steps:
        if isinstance(step, Narrowing):
            found[id(step.after)] = (*found[id(step.before)], step)
        else:
            found[id(step.parameter)] = (*found[id(step.parameter)], step)
    made = {}
    for name, tensor in after.items():
        known = found.get(id(tensor))
        # A buffer that follows from the width is computed anew.
        assert known is not None or not isinstance(tensor, nn.Parameter)
        made[name] = Replay(known or (), dtype, None if known is not None else tensor)
    return made
