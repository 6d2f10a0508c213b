"""Run one block of a model inside the model itself.

The blocks before it pass their input through, those after it are removed, and the model's own
``forward`` is called: it computes masks, rotary embeddings, layer types, position biases and
cross-attention, so no model family needs a driver of its own.

Shapes: B samples, T tokens, D features of the hidden state.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from prunekit.architectures import Stack
from prunekit.architectures.block_lists import own_embeddings
from prunekit.errors import ConfigError


class Context(dict[str, Tensor]):
    """Further inputs of a stack for one batch.

    ``encoder_hidden_states`` of a decoder after an encoder, ``input_ids`` of a stack that does not
    run from embeddings.

    Attributes:
        shared: Dictionaries that blocks fill for later ones, by name of the argument.
    """

    def __init__(self, inputs: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(inputs or {})
        self.shared: dict[str, MutableMapping[Any, Any]] = {}

    def share(self, name: str, value: Any) -> Any:  # noqa: ANN401
        """Return the argument of a block, the batch's own if blocks fill it.

        Args:
            name: Name of the argument.
            value: What the model passes; blocks fill a dictionary that is empty.
        """
        if isinstance(value, MutableMapping) and not value:
            return self.shared.setdefault(name, copy.copy(value))
        return value


class _EncoderOutput(BaseModelOutput):
    """Hidden states of an encoder; of its other outputs, as of routers, it has none."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _BlockProxy(nn.Module):
    """Replaces a block; attributes that the model reads are the block's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: its weights must not be seen twice

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.__dict__["block"], name)


class _PassThrough(_BlockProxy):
    """Returns its input, or ``hidden``, in the form of the block's output.

    It records its other arguments.
    """

    def __init__(self, block: nn.Module, tail: tuple | None, hidden: Tensor | None = None) -> None:
        super().__init__(block)
        self.__dict__.update(tail=tail, hidden=hidden)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        state = self.__dict__
        state["call"] = args, kwargs
        output = hidden_states if state["hidden"] is None else state["hidden"]
        return output if state["tail"] is None else (output, *state["tail"])


class _Follower(_BlockProxy):
    """Returns its input in the form of the output of a recorded block."""

    def __init__(self, block: nn.Module, recorder: "_Recorder") -> None:
        super().__init__(block)
        self.__dict__["recorder"] = recorder

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        tail = self.__dict__["recorder"].__dict__["tail"]
        return hidden_states if tail is None else (hidden_states, *tail)


class _Recorder(_BlockProxy):
    """Runs the block; records its input and further outputs."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        result = self.__dict__["block"](hidden_states, *args, **kwargs)
        tail = tuple(result[1:]) if isinstance(result, tuple | list) else None
        self.__dict__.update(hidden=hidden_states, tail=tail)
        return result


def _is_constant(value: Any) -> bool:  # noqa: ANN401
    """Return whether an argument of a block cannot change between calls."""
    if isinstance(value, tuple | list | dict):
        return all(map(_is_constant, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _shapes(hidden: Tensor, context: Context) -> tuple[torch.Size, ...]:
    """Return numbers of samples and tokens of a stack's inputs."""
    encoded = context.get("encoder_hidden_states")
    return (hidden.shape[:2], *([] if encoded is None else [encoded.shape[:2]]))


def _zeros(like: Tensor, width: int, ids: Tensor | torch.Size, *_: object, **__: object) -> Tensor:
    # Tables of positions are given the shape of the tokens, and return [T, D].
    shape = ids.shape if isinstance(ids, Tensor) else ids[-1:]
    return like.new_zeros(*shape, width)


@contextmanager
def _blank_embeddings(model: nn.Module, like: Tensor) -> Iterator[None]:
    """Let tables of embeddings, which may have no weights now, return zeros."""
    tables: list[Any] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for table in tables:
        table.forward = partial(_zeros, like, table.weight.shape[1])
    try:
        yield
    finally:
        for table in tables:
            del table.forward


class StackRunner:
    """The blocks of one stack, each of which can run by itself."""

    def __init__(self, model: PreTrainedModel, stack: Stack) -> None:
        self.model = model
        self.stack = stack
        base = model.base_model
        self.module: nn.Module = base.get_submodule(stack.module)
        path, _, self._attribute = stack.blocks.rpartition(".")
        self._owner = base.get_submodule(path)
        self.blocks: list[nn.Module] = list(getattr(self._owner, self._attribute))
        names = {module: name for name, module in model.named_modules()}
        self.names = [names[block] for block in self.blocks]
        # Further outputs of a block (T5's position bias), by the shapes of its inputs; each block
        # after the first one takes them from the one before it.
        self._tails: dict[tuple[torch.Size, ...], tuple | None] = {}
        self._call_key: tuple | None = None  # block, shape and dtype of the cached call
        self._call: tuple[tuple, dict[str, Any]] = (), {}

    @property
    def features(self) -> int:
        """Width of the embeddings that the stack is called with."""
        table: Any = own_embeddings(self.module) or self.model.get_input_embeddings()
        return table.weight.shape[1]

    @property
    def simple(self) -> bool:
        """Whether blocks return hidden states alone."""
        return not any(self._tails.values())

    @torch.no_grad()
    def enter(self, ids: Int[Tensor, "B T"], context: Context) -> Float[Tensor, "B T D"]:
        """Return the first block's input.

        Runs the embeddings and, to see the form of its output, that block.

        Args:
            ids: Tokens.
            context: Further inputs of the stack, or of its embeddings.
        """
        recorder = _Recorder(self.blocks[0])
        following: list[nn.Module] = [_Follower(block, recorder) for block in self.blocks[1:]]
        # All of them: a model may choose their kind of attention by the number of tokens.
        with self._blocks_replaced([recorder, *following]):
            self.module(input_ids=ids, **context)
        hidden = self._samples_first(recorder.__dict__["hidden"])
        self._check_length(ids, hidden)
        self._tails[_shapes(hidden, context)] = recorder.__dict__["tail"]
        return hidden

    def _check_length(self, ids: Tensor, hidden: Tensor) -> None:
        tokens, padded = ids.shape[1], hidden.shape[1]
        if tokens != padded:
            raise ConfigError(
                f"calibration: {type(self.model).__name__} pads samples of {tokens} tokens to "
                f"{padded} before its first block, which the others could not tell from tokens. "
                f"Choose a length that it does not pad, such as {padded}."
            )

    @torch.no_grad()
    def bind(
        self,
        index: int,
        hidden: Float[Tensor, "B T D"],
        context: Context,
        block: Callable[..., Any] | None = None,
    ) -> Callable[[], Float[Tensor, "B T D"]]:
        """Return the call of a block with the model's arguments.

        The call may be made later; it returns the hidden state after the block.

        Args:
            index: Number of the block within the stack.
            hidden: Its input.
            context: Further inputs of the stack.
            block: Runs in its place; None for the block itself.
        """
        args, kwargs = self._arguments(index, hidden, context)
        kwargs = {name: context.share(name, value) for name, value in kwargs.items()}
        block = block or self.blocks[index]

        def call() -> Tensor:
            result = block(self._as_called(hidden), *args, **kwargs)
            output = result[0] if isinstance(result, tuple | list) else result
            return self._samples_first(output)

        return call

    def _arguments(
        self, index: int, hidden: Tensor, context: Context
    ) -> tuple[tuple, dict[str, Any]]:
        """Return the block's other arguments, the same for batches of one shape."""
        key = index, hidden.shape, hidden.dtype
        cacheable = not context
        if cacheable and key == self._call_key:
            return self._call
        passing = self._pass_through(index + 1, hidden, context)
        with self._blocks_replaced(passing):
            if "input_ids" not in context:
                context = Context({"inputs_embeds": self._blank(hidden), **context})
            self.module(**context)
        self._call = passing[-1].__dict__["call"]
        # Not with a mutable argument: a key-value cache would grow with each call.
        self._call_key = None if not cacheable or not _is_constant(self._call) else key
        return self._call

    def finish(self, hidden: Float[Tensor, "B T D"], context: Context) -> Tensor:
        """Return the stack's output, after its final norm if any.

        Args:
            hidden: Output of the last block. If it requires a gradient, the result does too.
            context: Further inputs of the stack.
        """
        with torch.set_grad_enabled(hidden.requires_grad), self._last_hidden(hidden, context):
            if "input_ids" not in context:
                context = Context({"inputs_embeds": self._blank(hidden), **context})
            return self.module(**context)[0]

    def head(self, hidden: Float[Tensor, "B T D"], context: Context | None = None) -> Tensor:
        """Return the model's output, such as logits, for the last hidden state.

        Final norm and head of a decoder treat each position by itself, so any range of tokens may
        be passed.

        Args:
            hidden: Output of the last block. If it requires a gradient, the result does too.
            context: Further inputs of the stack.
        """
        encoded = (context or {}).get("encoder_hidden_states")
        given: dict[str, Any] = {}
        if encoded is not None:
            given["encoder_outputs"] = _EncoderOutput(encoded)
        prefix = "decoder_" if given else ""
        differentiable = hidden.requires_grad
        with torch.inference_mode(not differentiable), self._last_hidden(hidden, context or {}):
            if self.stack.reads_ids:
                ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
                with _blank_embeddings(self.model, hidden):
                    return self.model(**given, **{f"{prefix}input_ids": ids})[0]
            given[f"{prefix}inputs_embeds"] = self._blank(hidden)
            return self.model(**given)[0]

    def _as_called(self, hidden: Tensor) -> Tensor:
        """Return hidden states with the dimensions in the order of the blocks."""
        axis = self.stack.sample_axis
        return hidden.movedim((0, 1), (axis, axis + 1)) if axis else hidden

    def _samples_first(self, hidden: Tensor) -> Tensor:
        """Return hidden states with samples and tokens as first dimensions."""
        axis = self.stack.sample_axis
        return hidden.movedim((axis, axis + 1), (0, 1)) if axis else hidden

    def _blank(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:2], self.features)

    def _pass_through(self, count: int, hidden: Tensor, context: Context) -> list[nn.Module]:
        tail = self._tails.get(_shapes(hidden, context), next(iter(self._tails.values()), None))
        return [_PassThrough(block, tail) for block in self.blocks[:count]]

    @contextmanager
    def _last_hidden(self, hidden: Tensor, context: Context) -> Iterator[None]:
        passing = self._pass_through(len(self.blocks), hidden, context)
        passing[-1].__dict__["hidden"] = self._as_called(hidden)
        with self._blocks_replaced(passing):
            yield

    @contextmanager
    def _blocks_replaced(self, blocks: list[nn.Module]) -> Iterator[None]:
        original = getattr(self._owner, self._attribute)
        setattr(self._owner, self._attribute, nn.ModuleList(blocks))
        try:
            yield
        finally:
            setattr(self._owner, self._attribute, original)
