"""The result of pruning one linear."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NotRequired, Self, TypedDict

import torch
from prunekit_kernels import Pending, value_of
from torch import Tensor

from prunekit.checkpoint.adapter import Adapter
from prunekit.models.layout import Linear


class PrunedLinear(TypedDict):
    """The measurements of one linear, as :func:`prunekit.prune` returns them.

    Methods and recoveries add entries of their own, such as ``damping``.

    Attributes:
        name: Full name of the linear.
        shape: Output and input features.
        sparsity: Fraction of zeros, 0..1.
        relative_error: ‖WX − W′X‖² / ‖WX‖² of its outputs; None if not measured.
        seconds: Its share of the time that pruning the stage took.
        pattern: Name of its pattern, where the allocation chose another one.
        tokens: Tokens that were routed to its expert.
        starved: Policy that was applied because these were too few, or None.
    """

    name: str
    shape: list[int]
    sparsity: float
    relative_error: float | None
    seconds: float
    pattern: NotRequired[str]
    tokens: NotRequired[int]
    starved: NotRequired[str | None]


@dataclass(frozen=True)
class LayerResult:
    """The pruned weight of one linear and its measurements.

    On a GPU tensors and numbers are :class:`~prunekit_kernels.Pending`, until :meth:`arrived` waits
    for them.

    Attributes:
        linear: The linear.
        weight: Its weight as it will be stored, on the CPU.
        sparsity: Fraction of zeros, 0..1.
        relative_error: ‖WX − W′X‖² / ‖WX‖² of its outputs, before recovery; None if not measured.
        seconds: Its share of the time that pruning the stage took.
        tokens: Tokens that were routed to its expert; None for other linears.
        starved: Policy that was applied because these were too few; None if they were not.
        pattern: Name of its pattern, where the allocation chose another one than the run's.
        facts: Measurements of the method, by name.
        recovery: Errors after recovery, by name.
        adapter: Low-rank adapter that is stored beside the weight and added to it, if any.
        scale: Scales of the weight [O, G], on the CPU, if it is quantized.
    """

    linear: Linear
    weight: Tensor
    sparsity: float
    relative_error: float | None
    seconds: float
    tokens: int | None = None
    starved: str | None = None
    pattern: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    recovery: Mapping[str, float | None] = field(default_factory=dict)
    adapter: Adapter | None = None
    scale: Tensor | None = None

    @property
    def is_there(self) -> bool:
        """Whether the measurements can be read without waiting."""
        values = [self.sparsity, self.relative_error, self.seconds, *self.facts.values()]
        return all(
            value.is_there
            for value in (*values, *self.recovery.values())
            if isinstance(value, Pending)
        )

    def measurements(self) -> Self:
        """Return the result without its tensors."""
        return replace(self, weight=torch.empty(0), adapter=None, scale=None)

    def arrived(self) -> Self:
        """Return the result with all that was pending."""
        fields = {name: value_of(value) for name, value in vars(self).items()}
        fields["facts"] = {name: value_of(value) for name, value in self.facts.items()}
        fields["recovery"] = {name: value_of(value) for name, value in self.recovery.items()}
        return replace(self, **fields)

    def as_record(self) -> dict[str, Any]:
        """Return the measurements as journal and report hold them, once arrived."""
        record = {
            "name": self.linear.name,
            "shape": [self.linear.outputs, self.linear.inputs],
            "sparsity": self.sparsity,
            "relative_error": self.relative_error,
        }
        if self.tokens is not None:
            record |= {"tokens": self.tokens, "starved": self.starved}
        if self.pattern is not None:
            record["pattern"] = self.pattern
        return {**record, "seconds": self.seconds, **self.facts, **self.recovery}
