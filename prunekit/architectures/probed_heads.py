"""Finds the heads of a model type nobody declared, where transformers calls its attention function.

What that function is called with says how many heads there are and of which size; which linear
reads what it returns, and which wrote the values, is told by their memory.

Shapes: B samples, H query heads, K key heads, T tokens, D features of a head.
"""

import sys
from collections.abc import Iterator, Mapping
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

SIZES = ("head_dim", "head_size", "attention_head_size")
COUNTS: dict[str, Count] = {
    "num_heads": "heads",
    "num_attention_heads": "heads",
    "n_heads": "heads",
    "num_key_value_heads": "groups",
    "all_head_size": "width",
}
"""What attentions call the size of a head and what has to say how many there are."""
ENTRIES: tuple[tuple[str, Count], ...] = (
    ("num_attention_heads", "heads"),
    ("num_key_value_heads", "groups"),
    ("head_dim", "size"),
)
"""Entries of the configs that can say fewer heads; whether one really can is tried each time."""
_OURS = {"sdpa": "prunekit_probing_sdpa", "eager": "prunekit_probing_eager"}


@dataclass(frozen=True)
class Call:
    """One call of the attention function: H, K, D, what wrote the values, what the result is."""

    module: nn.Module
    heads: int
    groups: int
    size: int
    values: object
    result: object
    plain: bool


@dataclass
class Seen:
    """What a forward showed of attention.

    Attributes:
        calls: In the order of their calls.
        writes: Memory that each linear wrote, by its name.
        reads: Memory that each linear read.
    """

    calls: list[Call] = field(default_factory=list)
    writes: dict[str, object] = field(default_factory=dict)
    reads: dict[str, object] = field(default_factory=dict)


_seen: list[Seen] = []


@contextmanager
def seeing(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Iterator[Seen]:
    """Show every call of the attention function in a model of this kind, built from ``config``.

    There is none to see where a family computes attention by itself.
    """
    seen = Seen()
    theirs = config._attn_implementation or "eager"
    if hasattr(sys.modules[kind.__module__], "ALL_ATTENTION_FUNCTIONS"):
        config._attn_implementation = _OURS.get(theirs, theirs)
    _seen.append(seen)
    try:
        yield seen
    finally:
        _seen.pop()


def memory(x: Tensor) -> object:
    """Return the same for tensors that lie in the same memory."""
    return x.untyped_storage()._cdata


def attentions(
    model: nn.Module, blocks: str, seen: Seen, stages: Mapping[str, object]
) -> tuple[Attention, ...]:
    """Return where every block keeps its heads; nothing if that is not the same in all.

    Args:
        model: Whose forward was seen.
        blocks: Name of the list of blocks.
        seen: What it showed.
        stages: What each linear read, equal if it was the same tensor.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, list[Attention | None]] = {}
    for call in seen.calls:
        name = names[call.module]
        if name.startswith(f"{blocks}."):
            index, path = name.removeprefix(f"{blocks}.").split(".", 1)
            found.setdefault(index, []).append(
                _attention(call, f"{blocks}.{index}.", path, seen, stages)
            )
    each = [found.get(str(index)) for index in range(len(model.get_submodule(blocks)))]  # pyright: ignore
    first = each[0]
    if not first or None in first or any(other != first for other in each):
        return ()
    return tuple(attention for attention in first if attention is not None)


def _attention(
    call: Call, block: str, path: str, seen: Seen, stages: Mapping[str, object]
) -> Attention | None:
    """Return where one attention keeps its heads, if three linears of their own write them."""
    inside = [name for name in seen.writes if name.startswith(block)]
    values = [name for name in inside if seen.writes[name] == call.values]
    outputs = [name for name in inside if seen.reads[name] == call.result]
    if len(values) != 1 or len(outputs) != 1 or not call.plain:
        return None
    within = [name for name in inside if name.startswith(f"{block}{path}.")]
    writers = [name for name in within if stages[name] == stages[values[0]]]
    module, size = call.module, call.size
    known = {name.removeprefix(f"{block}{path}.") for name in (*writers, *outputs)}
    for name, parameter in module.named_parameters():
        # What norms or biases all heads at once, or each of them, would have to be cut too.
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
    said: dict[str, Count] = {name: count for name, count in COUNTS.items() if name in vars(module)}
    if any(getattr(module, name) != right[count] for name, count in said.items()):
        return None
    config: Any = getattr(module, "config", None)
    sayable = all(hasattr(config, name) for name, count in ENTRIES if count != "size")
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
        counts=tuple(said.items()),
        entries=ENTRIES if sayable else (),
    )


def narrow(model: nn.Module, blocks: str, found: tuple[Attention, ...]) -> bool:
    """Take the last key head and its query heads out of every attention of a model, by shape only.

    Returns:
        Whether there was more than one.
    """
    several = True
    for block in model.get_submodule(blocks).children():
        for attention in found:
            module: Any = block.get_submodule(attention.module)
            size = getattr(module, attention.size)
            key: Any = block.get_submodule(attention.key)
            query: Any = block.get_submodule(attention.query)
            groups, heads = key.out_features // size, query.out_features // size
            several &= groups > 1
            left = {"heads": heads - heads // groups, "groups": groups - 1}
            left["width"] = left["heads"] * size
            for name, count in ((attention.query, "heads"), (attention.key, "groups")):
                _cut(block.get_submodule(name), left[count] * size, outputs=True)
            _cut(block.get_submodule(attention.value), left["groups"] * size, outputs=True)
            _cut(block.get_submodule(attention.output), left["width"], outputs=False)
            for name, count in attention.counts:
                setattr(module, name, left[count])
    return several


def _cut(linear: Any, width: int, *, outputs: bool) -> None:  # noqa: ANN401
    weight = linear.weight.detach()
    linear.weight = nn.Parameter(weight[:width] if outputs else weight[:, :width])
    if outputs and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:width])


def _shown(function: Any, module: nn.Module, tensors: tuple[Tensor, ...], given: Any) -> Any:  # noqa: ANN401
    query, key, value, *_ = tensors
    result = function(module, *tensors, **given)
    size = value.shape[-1]
    _seen[-1].calls.append(
        Call(
            module,
            query.shape[1],
            key.shape[1],
            size,
            memory(value),
            memory(result[0]),
            # Heads one after another in what wrote them.
            plain=value.stride()[1] == size and query.shape[-1] == size,
        )
    )
    return result


def _sdpa(module: nn.Module, *tensors: Tensor, **given: Any) -> Any:  # noqa: ANN401
    return _shown(sdpa_attention_forward, module, tensors, given)


def _eager(module: nn.Module, *tensors: Tensor, **given: Any) -> Any:  # noqa: ANN401
    theirs = sys.modules[type(module).__module__].eager_attention_forward
    return _shown(theirs, module, tensors, given)


AttentionInterface.register(_OURS["sdpa"], _sdpa)
AttentionInterface.register(_OURS["eager"], _eager)
AttentionMaskInterface.register(_OURS["sdpa"], sdpa_mask)
AttentionMaskInterface.register(_OURS["eager"], eager_mask)
