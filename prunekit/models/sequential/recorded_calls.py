"""Arguments of blocks, recorded in one forward of the whole model.

A model that reads images runs its towers, merges their features with the embeddings, and may hand
positions and features on to blocks. For a batch with such inputs its own forward runs once, with
blocks that return zeros: it shows the first block's input and each block's other arguments, and
what is added to the hidden states between blocks. The towers do not run again.

Shapes: B samples, T tokens, D features.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PretrainedConfig

from prunekit.errors import ConfigError
from prunekit.models import stock

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class RecordedCalls:
    """Arguments of a stack's blocks for one batch, in main memory.

    Attributes:
        device: Device on which they are returned.
        calls: Arguments of each block besides the hidden states.
        inputs: Inputs of the model or stack.
        added: By number of a block, what the model adds to its input.
    """

    device: torch.device
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    added: dict[int, Tensor] = field(default_factory=dict)

    def __getitem__(self, index: int) -> Call:
        return _moved(self.calls[index], self.device)

    def onward(self, index: int, output: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Return the next block's input for the output of block ``index``."""
        added = self.added.get(index + 1)
        return output if added is None else output + added.to(self.device)


class Ended(Exception):  # noqa: N818  no error
    """Ends a forward behind the blocks of a tower."""


@dataclass
class Answer:
    """What is returned in place of outputs of blocks.

    Attributes:
        hidden: Hidden states; None before the first block has run.
        tail: Further outputs of a block; None if it returns hidden states alone.
    """

    hidden: Tensor | None = None
    tail: tuple[Any, ...] | None = None


class Caller:
    """Records the arguments of a block; the first one runs it.

    It takes the place of the block's forward: the model sees the same module, whose outputs it may
    collect by hooks.

    Attributes:
        block: The block.
        hidden: The hidden states that it was called with.
        call: Its other arguments; None until it is called.
        answer: What the callers of all blocks return.
    """

    def __init__(self, block: nn.Module, answer: Answer) -> None:
        self.block, self.answer = block, answer
        self.hidden: Any = None
        self.call: Call | None = None
        self._own: Any = block.__dict__.get("forward")
        self._forward = block.forward

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Return the answer in the form of the block's output."""
        if self.call is not None:
            raise ConfigError(
                "calibration: the blocks are called more than once for a row of images with text. "
                "Give rows of one image, or calibrate on text."
            )
        self.hidden, self.call, answer = hidden_states, (args, kwargs), self.answer
        if answer.hidden is None:
            result = self._forward(hidden_states, *args, **kwargs)
            output, *rest = result if isinstance(result, tuple | list) else (result,)
            answer.tail = tuple(rest) if isinstance(result, tuple | list) else None
            answer.hidden = torch.zeros_like(output)
        return answer.hidden if answer.tail is None else (answer.hidden, *answer.tail)

    def restore(self) -> None:
        """Give the block its own forward again."""
        if self._own is None:
            del self.block.forward
        else:
            self.block.forward = self._own


@contextmanager
def in_place_of_blocks(callers: Sequence[Caller]) -> Iterator[None]:
    """Let callers take the calls of their blocks for a ``with`` block."""
    for caller in callers:
        caller.block.forward = caller
    try:
        yield
    finally:
        for caller in callers:
            caller.restore()


def record_calls(callers: Sequence[Caller], device: torch.device) -> RecordedCalls:
    """Return the calls that callers have recorded, which returned zeros.

    Args:
        callers: Those of all blocks.
        device: Device that runs blocks.

    Raises:
        ConfigError: A block was not called, or is called with an object that others change.
    """
    moved: dict[int, Tensor] = {}
    found = RecordedCalls(device)
    for number, caller in enumerate(callers):
        hidden, call = caller.hidden, caller.call
        if call is None:
            raise ConfigError(
                f"calibration: block {number} is not called for a batch with images. Calibrate on "
                "text."
            )
        caller.call = None
        for value in tree_leaves(call):
            if not (value is None or isinstance(value, bool | int | float | str | Tensor)):
                raise ConfigError(
                    f"calibration: blocks are called with a {type(value).__name__}, which "
                    "cannot be kept for a batch with images. Calibrate on text."
                )
        found.calls.append(_moved(call, torch.device("cpu"), moved))
        if number and hidden is not caller.answer.hidden and hidden.any():
            found.added[number] = hidden.cpu()
    return found


def check_added(callers: Sequence[Caller], recorded: RecordedCalls) -> None:
    """Check that the model only adds to hidden states between blocks.

    Args:
        callers: Those that have returned other hidden states than zeros.
        recorded: What was recorded with zeros.

    Raises:
        ConfigError: The model changes hidden states in another way.
    """
    for number, caller in enumerate(callers[1:], 1):
        assert caller.answer.hidden is not None
        if not torch.equal(recorded.onward(number - 1, caller.answer.hidden), caller.hidden):
            raise ConfigError(
                f"calibration: for images the model changes the hidden states before block "
                f"{number}, other than by adding to them. Calibrate on text."
            )


@contextmanager
def ended_before(module: nn.Module | None) -> Iterator[None]:
    """End a forward where it calls a module, if one is given."""
    if module is None:
        yield
        return

    def end(*_: object) -> None:
        raise Ended

    hook = module.register_forward_pre_hook(end)
    try:
        with suppress(Ended):
            yield
    finally:
        hook.remove()


@contextmanager
def without_cache(config: PretrainedConfig) -> Iterator[None]:
    """Let a model run without a key-value cache."""
    parts = [part for part in stock.config_parts(config) if stock.config_value(part, "use_cache")]
    for part in parts:
        part.use_cache = False
    try:
        yield
    finally:
        for part in parts:
            part.use_cache = True


def to_run(inputs: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Return inputs on a tensor's device, floats in its dtype."""
    return {
        name: value.to(like.device, like.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _moved(call: Call, device: torch.device, moved: dict[int, Tensor] | None = None) -> Call:
    """Return arguments on a device; tensors in ``moved`` are used again."""

    def move(value: Any) -> Any:  # noqa: ANN401
        if not isinstance(value, Tensor):
            return value
        if moved is None:
            return value.to(device)
        return moved.setdefault(id(value), value.to(device))

    return tree_map(move, call)
