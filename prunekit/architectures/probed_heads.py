"""Locate the attention heads of model types without a declaration.

The arguments of the transformers attention function show the number and the size of the heads. The
linears around it are identified by tensor storage: value linears wrote the storage of its value
argument, output linears read the storage of its result. Where one linear computes query, key and
value, their order is seen from the offset and the stride of the value argument.

Shapes: B samples, H query heads, K key heads, T tokens, D features per head.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from prunekit.architectures.attention_trace import AttentionCall, AttentionTrace
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
    """Return an attention, if linears are known to write its heads."""
    inside = [name for name in trace.writes if name.startswith(block)]
    values = [name for name in inside if trace.writes[name] == call.values]
    outputs = [name for name in inside if trace.reads[name] == call.result]
    if len(values) != 1 or len(outputs) != 1:
        return None
    within = [name for name in inside if name.startswith(f"{block}{path}.")]
    writers = [name for name in within if stages[name] == stages[values[0]]]
    module, size = call.module, call.size
    known = {name.removeprefix(f"{block}{path}.") for name in (*writers, *outputs)}
    for name, parameter in module.named_parameters():
        # A norm or bias over all heads, or with weights per head, would have to be cut as well.
        if name.rpartition(".")[0] not in known and parameter.shape != (size,):
            return None
    projections = _projections(call, values[0], writers, f"{block}{path}.")
    if projections is None:
        return None
    *linears, interleaved = projections
    sizes = [name for name in SIZES if getattr(module, name, None) == size]
    if not sizes:
        return None
    right = {"heads": call.heads, "groups": call.groups, "width": call.heads * size}
    counts: dict[str, Count] = {each: COUNTS[each] for each in COUNTS if each in vars(module)}
    if any(getattr(module, name) != right[count] for name, count in counts.items()):
        return None
    config: Any = getattr(module, "config", None)
    named = all(hasattr(config, name) for name, count in ENTRIES if count != "size")
    query, key, value, output = (name.removeprefix(block) for name in (*linears, outputs[0]))
    return Attention(
        module=path,
        query=query,
        key=key,
        value=value,
        output=output,
        size=sizes[0],
        interleaved=interleaved,
        counts=tuple(counts.items()),
        entries=ENTRIES if named else (),
        emptiable=False,  # some add the residual stream to their output
    )


def _projections(
    call: AttentionCall, value: str, writers: list[str], prefix: str
) -> tuple[str, str, str, bool] | None:
    """Return the linears of query, key, value, and whether they interleave.

    Args:
        call: The call of the attention function.
        value: Name of the linear that computes values.
        writers: Names of all linears that read the same input.
        prefix: Start of these names, up to the module.
    """
    widths = {
        name: getattr(call.module.get_submodule(name.removeprefix(prefix)), "out_features", 0)
        for name in writers
    }
    if (interleaved := call.interleaved(widths[value])) is not None:
        return value, value, value, interleaved
    others = [name for name in writers if name != value]
    expected = [call.heads * call.size, call.groups * call.size]
    found = [widths[name] for name in others]
    if not call.separate or sorted(found) != sorted(expected):
        return None
    query, key = others if found == expected else others[::-1]
    return query, key, value, False


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
            heads = block.get_submodule(attention.output).in_features // size  # pyright: ignore
            query: Any = block.get_submodule(attention.query)
            key: Any = block.get_submodule(attention.key)
            groups = key.out_features // size
            if key is query:
                groups = (groups - heads) // 2
            removable &= groups > 1
            remaining = {"heads": heads - heads // groups, "groups": groups - 1}
            remaining["width"] = remaining["heads"] * size
            widths = {query: remaining["width"], key: (groups - 1) * size}
            widths[block.get_submodule(attention.value)] = (groups - 1) * size
            if key is query:
                widths = {query: remaining["width"] + 2 * (groups - 1) * size}
            for linear, width in widths.items():
                _cut(linear, width, outputs=True)
            _cut(block.get_submodule(attention.output), remaining["width"], outputs=False)
            for name, count in attention.counts:
                setattr(module, name, remaining[count])
    return removable


def _cut(linear: Any, width: int, *, outputs: bool) -> None:  # noqa: ANN401
    weight = linear.weight.detach()
    linear.weight = nn.Parameter(weight[:width] if outputs else weight[:, :width])
    if outputs and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:width])
