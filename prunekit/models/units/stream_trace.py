"""Follow the coordinates of the residual stream through a traced forward.

Tensors are followed from the embeddings through operations that leave each coordinate by itself;
modules with parameters along the coordinates may combine those that a norm wrote.

Shapes: D coordinates.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from prunekit.architectures.coverage import LINEAR_TYPES
from prunekit.architectures.origins import SHAPE_ONLY, tensors
from prunekit.architectures.probed_feed_forwards import CASTS, VIEWS
from prunekit.models.units.coordinates import CoordinateAxis

STREAM, NORMED = "the residual stream", "a norm of the residual stream"
"""What a tensor with the coordinates is."""
BY_ROWS = {"index", "index_select", "index_add", "index_add_", "cat", "select", "unbind"}
"""Further operations that leave the coordinates as they are, where the last dimension is left."""


class Number(NamedTuple):
    """A number that an operation of the forward takes.

    Attributes:
        operation: Name of the operation.
        value: The number.
        scales: It is a factor, before any norm.
    """

    operation: str
    value: float
    scales: bool


class StreamTrace(TorchDispatchMode):
    """Follows the coordinates through a forward.

    Attributes:
        numbers: Numbers that operations take, in their order.
        faults: Why coordinates cannot be taken out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[Number] = []
        self.faults: dict[str, None] = {}
        self._normed = False

    @override
    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [*tensors((args, kwargs))]
        inputs = [each for each in given if _state(each)]
        scales = name in ("mul", "mul_") and not self._normed
        factors = torch.Tag.pointwise in func.tags  # others take sizes
        values = [*_values((*args, *(kwargs or {}).values()), integers=factors)]
        if name in CASTS and values:
            output.number = values[0]
        elif name != "device":
            self.numbers += [Number(name, value, scales) for value in values]
        if not inputs or any(part in name for part in SHAPE_ONLY):
            return output
        is_stream = any(_state(each) == STREAM for each in inputs)
        for result in tensors(output):
            if all(_is_kept(func, args, each, result) for each in inputs):
                _mark(result, STREAM if is_stream else NORMED)
            else:
                self.faults[f"{name} combines the coordinates of {_state(inputs[0])}"] = None
        return output

    def embed(self, _: nn.Module, __: Any, output: Tensor) -> None:  # noqa: ANN401
        """Note the output of a module that writes the stream."""
        for each in tensors(output):
            _mark(each, STREAM)

    def before_norm(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Note that a norm reads the stream, whose coordinates it may combine."""
        self._normed = True
        return _unmarked(inputs)

    def after_norm(self, _: nn.Module, __: Any, output: Tensor) -> None:  # noqa: ANN401
        """Note the output of a norm."""
        _mark(output, NORMED)

    def before_reader(self, name: str) -> Callable[..., tuple[Any, ...]]:
        """Return a hook of a module whose parameters combine the coordinates."""

        def hook(
            _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]]:
            states = [_state(each) for each in tensors((inputs, named))]
            if states[0] != NORMED or STREAM in states:
                read = next((each for each in states if each != NORMED), None)
                self.faults[f"{name} reads {read or 'what no norm wrote'}"] = None
            return _unmarked(inputs), dict(zip(named, _unmarked([*named.values()]), strict=True))

        return hook


def follow(
    trace: StreamTrace, path: str, module: nn.Module, axis: CoordinateAxis, *, is_expert: bool
) -> None:
    """Follow the coordinates through a module with parameters along them."""
    writes = isinstance(module, nn.Embedding)
    if isinstance(module, LINEAR_TYPES):
        outputs = int(isinstance(module, Conv1D))
        writes = axis.name == "bias" or axis.axis == outputs
    if not writes:
        module.register_forward_pre_hook(trace.before_reader(path), with_kwargs=True)
    if writes or is_expert:
        module.register_forward_hook(trace.embed)


def _state(x: Tensor) -> str | None:
    return x.__dict__.get("coordinates")


def _mark(x: Any, state: str | None) -> None:  # noqa: ANN401
    x.coordinates = state


def _unmarked(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Return arguments whose marked tensors are replaced with unmarked aliases."""
    return tuple(_alias(each) if isinstance(each, Tensor) else each for each in arguments)


def _alias(x: Tensor) -> Tensor:
    alias = x.detach()
    _mark(alias, None)
    return alias


def _is_kept(func: Any, args: tuple[Any, ...], x: Tensor, result: Tensor) -> bool:  # noqa: ANN401
    """Return whether an operation leaves the coordinates in place."""
    name = func.overloadpacket.__name__
    if not (x.ndim and result.ndim and x.shape[-1] == result.shape[-1]):
        return False
    if name == "index" and len(args[1]) == x.ndim and args[1][-1] is not None:
        return False  # an order of the coordinates
    if name.startswith("index_") and args[1] in (-1, x.ndim - 1):
        return False
    views = name in VIEWS and x.stride(-1) == result.stride(-1) == 1
    return torch.Tag.pointwise in func.tags or name in CASTS or name in BY_ROWS or views


def _values(arguments: Iterable[Any], *, integers: bool) -> Iterator[float]:
    """Return the numbers among an operation's arguments, also tensors."""
    for each in arguments:
        whole = integers and isinstance(each, int) and not isinstance(each, bool)
        if whole or isinstance(each, float):
            yield float(each)
        elif isinstance(each, Tensor) and (value := _number(each)) is not None:
            yield value


def _number(x: Tensor) -> float | None:
    """Return the value of a constant."""
    constant = getattr(x, "constant", None)
    if constant is None or constant.ndim:
        return x.__dict__.get("number")
    with _disable_current_modes():  # it is no fake tensor
        return float(constant)
