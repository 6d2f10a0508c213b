"""Locate the neurons of model types without a declaration.

A neuron is an input of a linear that was computed, entry by entry, from one output of each of some
other linears: of one, or of a gate and an up projection. Every operation between them has to be a
pointwise one, or a view that leaves the features together. What else reads these outputs, such as
a norm over all neurons, rules them out.

Shapes: N neurons, T tokens, D features of the hidden states.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig
from typing_extensions import override

from prunekit.architectures.base import FeedForward
from prunekit.architectures.origins import tensors

ENTRIES = ("intermediate_size", "ffn_dim", "n_inner", "inner_dim", "hidden_dim", "ffn_hidden_size")
"""Usual config entries for the number of neurons, tried first."""
PART_OF_ENTRY = ("intermediate", "ffn", "inner", "feed_forward", "mlp")
CASTS = {"_to_copy", "clone", "detach", "alias", "lift_fresh"}
"""Operations on each entry alone that torch does not tag as pointwise."""
RESHAPES = {"view", "_unsafe_view"}
VIEWS = RESHAPES | {"unsqueeze", "squeeze", "expand", "transpose", "permute", "slice", "t"}
VIEWS |= {"split", "split_with_sizes"}
Source = tuple[str, int | None]
"""A linear, and which of its outputs a tensor's first feature comes from; None: from several."""


@dataclass
class PointwiseTrace:
    """Linears whose inputs depend, entry by entry, on outputs of others.

    Attributes:
        reads: Sources and width of the input of each linear.
        mixed: Linears of which a tensor other than a linear's output combines several outputs.
    """

    reads: dict[str, tuple[frozenset[Source], int]] = field(default_factory=dict)
    mixed: set[str] = field(default_factory=set)

    def note(self, name: str, x: Tensor, output: Tensor) -> None:
        """Note the call of a linear."""
        self.reads[name] = sources(x), x.shape[-1]
        output.sources = frozenset({(name, 0)})  # pyright: ignore[reportAttributeAccessIssue]


def sources(x: Tensor) -> frozenset[Source]:
    """Return the noted sources of a tensor."""
    return x.__dict__.get("sources", frozenset())


class Sources(TorchDispatchMode):
    """Notes on each tensor which outputs of linears its features come from."""

    def __init__(self, trace: PointwiseTrace, matrices: Callable[[Tensor], bool]) -> None:
        """Create the mode.

        Args:
            trace: Receives the linears whose outputs are combined.
            matrices: Tells whether a tensor is the weight of a linear.
        """
        super().__init__()
        self._trace, self._is_matrix = trace, matrices

    @override
    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [each for each in tensors((args, kwargs)) if sources(each)]
        if not inputs:
            return output
        if any(self._is_matrix(each) for each in tensors((args, kwargs))):
            return output  # of a linear
        for result in tensors(output):
            found = frozenset().union(*(_carried(func, each, result) for each in inputs))
            result.sources = found  # pyright: ignore[reportAttributeAccessIssue]
            self._trace.mixed |= {name for name, offset in found if offset is None}
        return output


def _carried(func: Any, x: Tensor, result: Tensor) -> frozenset[Source]:  # noqa: ANN401
    """Return the sources that an operation leaves of one input's."""
    name = func.overloadpacket.__name__
    same = x.ndim and result.ndim and x.shape[-1] == result.shape[-1]
    if same and (torch.Tag.pointwise in func.tags or name in CASTS):
        return sources(x)
    moved = name not in VIEWS or not x.ndim or not result.ndim
    if moved or (name in RESHAPES and not same) or {x.stride(-1), result.stride(-1)} != {1}:
        return frozenset((each, None) for each, _ in sources(x))
    row = x.stride(-2) if x.ndim > 1 else x.shape[-1]
    start = int(result.storage_offset() - x.storage_offset()) % max(int(row), 1)
    inside = start + result.shape[-1] <= x.shape[-1]
    return frozenset(
        (each, offset + start if inside and offset is not None else None)
        for each, offset in sources(x)
    )


def find_feed_forwards(
    model: nn.Module, blocks: str, trace: PointwiseTrace, skipped: tuple[str, ...]
) -> dict[FeedForward, int]:
    """Return the feed-forwards of the blocks with their largest number of neurons.

    Blocks may be without some of them. None of a path is returned where blocks that have it differ.

    Args:
        model: The model whose forward was traced.
        blocks: Name of the list of blocks.
        trace: The trace of that forward.
        skipped: Modules and linears whose neurons are left alone, such as experts.
    """
    by_path: dict[str, set[FeedForward | None]] = {}
    widths: dict[str, int] = {}
    for name, (found, width) in trace.reads.items():
        if not name.startswith(f"{blocks}."):
            continue
        index, path = name.removeprefix(f"{blocks}.").split(".", 1)
        inside = any(name == each or name.startswith(f"{each}.") for each in skipped)
        written = None if inside else _feed_forward(model, f"{blocks}.{index}.", path, found, width)
        writes = {writer for writer, _ in found}
        if written and (writes & trace.mixed or writes & set(skipped)):
            written = None
        by_path.setdefault(path, set()).add(written)
        widths[path] = max(width, widths.get(path, 0))
    alone = [each.pop() for each in by_path.values() if len(each) == 1]
    known = [each for each in alone if each is not None]
    written = [linear for each in known for linear in each.inputs]
    # Outputs that two linears read are units of neither.
    return {
        each: widths[each.output]
        for each in known
        if all(written.count(linear) == 1 for linear in each.inputs)
    }


def _feed_forward(
    model: nn.Module, block: str, path: str, found: frozenset[Source], width: int
) -> FeedForward | None:
    """Return a feed-forward if the inputs of a linear are neurons."""
    offsets: dict[str, set[int | None]] = {}
    for writer, offset in found:
        offsets.setdefault(writer, set()).add(offset)
    if not offsets or not all(writer.startswith(block) for writer in offsets):
        return None
    features = {_features(model.get_submodule(f"{block}{path}"))[0]}
    for writer, starts in offsets.items():
        inputs, outputs = _features(model.get_submodule(writer))[::-1]
        features.add(inputs)
        if starts != {*range(0, outputs, width)}:
            return None
    if len(features) > 1:  # of a low-rank product, whose ends differ
        return None
    return FeedForward(tuple(sorted(writer.removeprefix(block) for writer in offsets)), path)


def find_entry(config: PreTrainedConfig, width: int, stack: str = "") -> str:
    """Return the config entry with a number of neurons, or "".

    Each removal checks whether it does.

    Args:
        config: The config of the stack.
        width: The number of neurons.
        stack: Name of the module that runs the stack; entries named after it come first.
    """
    values = config.to_dict()
    named = [key for key in values if any(part in key for part in PART_OF_ENTRY)]
    names = [*(name for name in ENTRIES if name in values), *named]
    names.sort(key=lambda name: not (stack and stack in name))
    right = [name for name in names if values[name] == width]
    return next(iter(right + [name for name in names if values[name] is None]), "")


def remove_last_neuron(
    blocks: nn.Module, found: Iterable[FeedForward]
) -> Iterator[tuple[Any, str, nn.Parameter]]:
    """Remove a neuron from each feed-forward; yield the parameters before.

    Args:
        blocks: The list of blocks, with fake tensors.
        found: The feed-forwards; blocks may be without some.
    """
    for block in blocks.children():
        have = dict(block.named_modules())
        for each in found:
            if each.output not in have:
                continue
            width = _features(have[each.output])[1]
            yield from _replace(have[each.output], 1, [*range(width - 1)])
            for name in each.inputs:
                outputs = _features(have[name])[0]
                kept = [row for row in range(outputs) if (row + 1) % width]
                yield from _replace(have[name], 0, kept)


def _replace(linear: Any, axis: int, keep: list[int]) -> Iterator[tuple[Any, str, nn.Parameter]]:  # noqa: ANN401
    weight = linear.weight
    stored = axis if isinstance(linear, nn.Linear) else 1 - axis
    index = torch.tensor(keep)
    yield linear, "weight", weight
    linear.weight = nn.Parameter(weight.detach().index_select(stored, index))
    if axis == 0 and linear.bias is not None:
        yield linear, "bias", linear.bias
        linear.bias = nn.Parameter(linear.bias.detach().index_select(0, index))
    if not isinstance(linear, nn.Linear) and axis == 0:
        yield linear, "nf", linear.nf
        linear.nf = len(keep)


def _features(linear: Any) -> tuple[int, int]:  # noqa: ANN401
    """Return the numbers of outputs and inputs of a linear."""
    shape = linear.weight.shape
    return tuple(shape) if isinstance(linear, nn.Linear) else (shape[1], shape[0])
