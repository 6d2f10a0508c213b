"""Locate the attention heads of model types without a declaration.

The arguments of the transformers attention function show the number and the size of the heads. The
linears around it are identified by tensor storage: value linears wrote the storage of its value
argument, output linears read the storage of its result.

Shapes: B samples, H query heads, K key heads, T tokens, D features per head.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
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

from prunekit.architectures.base import Attention, Count
from prunekit.architectures.coverage import has_module

SIZES = ("head_dim", "head_size", "attention_head_size")
COUNTS: dict[str, Count] = {
    "num_heads": "heads",
    "num_attention_heads": "heads",
    "n_heads": "heads",
    "num_key_value_heads": "groups",
    "all_head_size": "width",
}
"""Attribute names of attention modules: SIZES for the head size, COUNTS for the head counts."""
ENTRIES: tuple[tuple[str, Count], ...] = (
    ("num_attention_heads", "heads"),
    ("num_key_value_heads", "groups"),
    ("head_dim", "size"),
)
"""Config entries that can express fewer heads; each removal checks whether they really do."""
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
        plain: Whether each head occupies contiguous features of its linear's output.
    """

    module: nn.Module
    heads: int
    groups: int
    size: int
    values: object
    result: object
    plain: bool


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


def find_attentions(
    model: nn.Module, blocks: str, trace: AttentionTrace, stages: Mapping[str, object]
) -> tuple[Attention, ...]:
    """Return the attentions of the blocks; empty where blocks differ in them.

    Args:
        model: The model whose forward was traced.
        blocks: Name of the list of blocks.
        trace: The trace of that forward.
        stages: Identity of the input of each linear; equal for the same tensor.
    """
    names = {module: name for name, module in model.named_modules()}
    by_block: dict[str, list[Attention | None]] = {}
    for call in trace.calls:
        name = names[call.module]
        if name.startswith(f"{blocks}."):
            index, path = name.removeprefix(f"{blocks}.").split(".", 1)
            by_block.setdefault(index, []).append(
                _attention(call, f"{blocks}.{index}.", path, trace, stages)
            )
    first, *others = [*by_block.values()] or [[]]
    if None in first or any(other != first for other in others):
        return ()
    return tuple(attention for attention in first if attention is not None)


def _attention(
    call: AttentionCall, block: str, path: str, trace: AttentionTrace, stages: Mapping[str, object]
) -> Attention | None:
    """Return one attention if separate linears compute query, key and value."""
    inside = [name for name in trace.writes if name.startswith(block)]
    values = [name for name in inside if trace.writes[name] == call.values]
    outputs = [name for name in inside if trace.reads[name] == call.result]
    if len(values) != 1 or len(outputs) != 1 or not call.plain:
        return None
    within = [name for name in inside if name.startswith(f"{block}{path}.")]
    writers = [name for name in within if stages[name] == stages[values[0]]]
    module, size = call.module, call.size
    known = {name.removeprefix(f"{block}{path}.") for name in (*writers, *outputs)}
    for name, parameter in module.named_parameters():
        # A norm or bias over all heads, or with weights per head, would have to be cut as well.
        if name.rpartition(".")[0] not in known and parameter.shape != (size,):
            return None
    others = [name for name in writers if name != values[0]]
    widths = [
        getattr(module.get_submodule(name.removeprefix(f"{block}{path}.")), "out_features", 0)
        for name in others
    ]
    expected = [call.heads * size, call.groups * size]
    if sorted(widths) != sorted(expected):
        return None
    query, key = others if widths == expected else others[::-1]
    sizes = [name for name in SIZES if getattr(module, name, None) == size]
    if not sizes:
        return None
    right = {"heads": call.heads, "groups": call.groups, "width": call.heads * size}
    counts: dict[str, Count] = {each: COUNTS[each] for each in COUNTS if each in vars(module)}
    if any(getattr(module, name) != right[count] for name, count in counts.items()):
        return None
    config: Any = getattr(module, "config", None)
    named = all(hasattr(config, name) for name, count in ENTRIES if count != "size")
    query, key, value, output = (
        name.removeprefix(block) for name in (query, key, values[0], outputs[0])
    )
    return Attention(
        module=path,
        query=query,
        key=key,
        value=value,
        output=output,
        size=sizes[0],
        counts=tuple(counts.items()),
        entries=ENTRIES if named else (),
        emptiable=False,  # some add the residual stream to their output
    )


def remove_last_key_head(model: nn.Module, blocks: str, attentions: tuple[Attention, ...]) -> bool:
    """Remove the last key head and its query heads from every attention.

    Only shapes and head counts matter, since the model has fake tensors.

    Args:
        model: The model to change in place.
        blocks: Name of the list of blocks.
        attentions: The attentions of each block.

    Returns:
        Whether every attention had more than one key head.
    """
    removable = True
    for block in model.get_submodule(blocks).children():
        for attention in attentions:
            if not has_module(block, attention.output):
                continue
            module: Any = block.get_submodule(attention.module)
            size = getattr(module, attention.size)
            key: Any = block.get_submodule(attention.key)
            query: Any = block.get_submodule(attention.query)
            groups, heads = key.out_features // size, query.out_features // size
            removable &= groups > 1
            remaining = {"heads": heads - heads // groups, "groups": groups - 1}
            remaining["width"] = remaining["heads"] * size
            for name, count in ((attention.query, "heads"), (attention.key, "groups")):
                _cut(block.get_submodule(name), remaining[count] * size, outputs=True)
            _cut(block.get_submodule(attention.value), remaining["groups"] * size, outputs=True)
            _cut(block.get_submodule(attention.output), remaining["width"], outputs=False)
            for name, count in attention.counts:
                setattr(module, name, remaining[count])
    return removable


def _cut(linear: Any, width: int, *, outputs: bool) -> None:  # noqa: ANN401
    weight = linear.weight.detach()
    linear.weight = nn.Parameter(weight[:width] if outputs else weight[:, :width])
    if outputs and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:width])


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
            # Each head is contiguous in the output of its linear.
            plain=value.stride()[1] == size and query.shape[-1] == size,
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
