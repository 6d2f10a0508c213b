"""Trace the calls of the transformers attention function in one forward.

Shapes: B samples, H query heads, K key heads, T tokens, D features per head.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

_TRACED = {"sdpa": "prunekit_probing_sdpa", "eager": "prunekit_probing_eager"}


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function.

    Attributes:
        module: The calling attention module.
        heads: H.
        groups: K.
        size: D.
        values: Storage of the value argument.
        result: Storage of the result.
        offset: Number of the linear's output that is the first of the values.
        stride: Outputs of the linear from one value head to the next.
        equal: Whether queries have the size of values.
    """

    module: nn.Module
    heads: int
    groups: int
    size: int
    values: object
    result: object
    offset: int
    stride: int
    equal: bool

    @property
    def separate(self) -> bool:
        """Whether the heads of the values are neighbours in their linear's output."""
        return self.equal and self.stride == self.size

    def interleaved(self, width: int) -> bool | None:
        """Return how one linear of a width holds query, key and value.

        True: those of each key head together; False: all queries, then all keys, then all values;
        None: in another way, or it holds something else. Only the place of the values is seen; that
        queries come before keys is assumed, which matters where there are fewer keys.
        """
        shared = self.heads // self.groups
        if not self.equal or width != (self.heads + 2 * self.groups) * self.size:
            return None
        if (self.offset, self.stride) == ((self.heads + self.groups) * self.size, self.size):
            return False
        together = (shared + 1) * self.size, (shared + 2) * self.size
        return True if (self.offset, self.stride) == together else None


@dataclass
class AttentionTrace:
    """Attention calls and linear inputs and outputs recorded during one forward.

    Attributes:
        calls: Calls of the attention function in execution order.
        writes: Storage of the output of each linear, by name.
        reads: Storage of the input of each linear, by name.
    """

    calls: list[AttentionCall] = field(default_factory=list)
    writes: dict[str, object] = field(default_factory=dict)
    reads: dict[str, object] = field(default_factory=dict)


_traces: list[AttentionTrace] = []


@contextmanager
def trace_attention(model: PreTrainedModel, config: PreTrainedConfig) -> Iterator[AttentionTrace]:
    """Record the attention calls of models built from ``config`` inside the context.

    The trace has no calls if the family does not use the transformers attention interface.

    Args:
        model: A model of the family.
        config: A config of its kind.
    """
    trace = AttentionTrace()
    implementation = config._attn_implementation or "eager"
    files = {type(module).__module__ for module in model.modules()}
    if any(hasattr(sys.modules[file], "ALL_ATTENTION_FUNCTIONS") for file in files):
        config._attn_implementation = _TRACED.get(implementation, implementation)
    _traces.append(trace)
    try:
        yield trace
    finally:
        _traces.pop()


def storage_id(x: Tensor) -> object:
    """Return a value that is equal for tensors with the same storage."""
    return x.untyped_storage()._cdata


def _traced_call(
    function: Callable[..., Any],
    module: nn.Module,
    tensors: tuple[Tensor, ...],
    options: dict[str, Any],
) -> Any:  # noqa: ANN401
    query, key, value, *_ = tensors
    result = function(module, *tensors, **options)
    size = value.shape[-1]
    _traces[-1].calls.append(
        AttentionCall(
            module,
            query.shape[1],
            key.shape[1],
            size,
            storage_id(value),
            storage_id(result[0]),
            offset=int(value.storage_offset()),
            stride=int(value.stride()[1]),
            equal=query.shape[-1] == size,
        )
    )
    return result


def _sdpa(module: nn.Module, *tensors: Tensor, **options: Any) -> Any:  # noqa: ANN401
    return _traced_call(sdpa_attention_forward, module, tensors, options)


def _eager(module: nn.Module, *tensors: Tensor, **options: Any) -> Any:  # noqa: ANN401
    function = sys.modules[type(module).__module__].eager_attention_forward
    return _traced_call(function, module, tensors, options)


AttentionInterface.register(_TRACED["sdpa"], _sdpa)
AttentionInterface.register(_TRACED["eager"], _eager)
AttentionMaskInterface.register(_TRACED["sdpa"], sdpa_mask)
AttentionMaskInterface.register(_TRACED["eager"], eager_mask)
