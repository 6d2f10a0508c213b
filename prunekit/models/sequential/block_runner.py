"""Runs one block of a model inside the model itself.

The blocks before it pass through, those after it are left out, and the model's own ``forward``
is called: masks, rotary embeddings, layer types, position biases and cross-attention are what the
model computes, so no family needs a driver of its own.

Shapes: B samples, T tokens, D features of the hidden state.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.architectures import Stack

Context = dict[str, Tensor]
"""What a stack reads besides its own stream: ``encoder_hidden_states`` in a decoder of two."""


class _StandIn(nn.Module):
    """Stands where a block stood, and answers what a model asks the block itself."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: its weights must not be seen twice

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.__dict__["block"], name)


class _PassThrough(_StandIn):
    """Gives on what it is given (or ``hidden``), in the form in which the block answers.

    It remembers with what else it was called.
    """

    def __init__(self, block: nn.Module, tail: tuple | None, hidden: Tensor | None = None) -> None:
        super().__init__(block)
        self.__dict__.update(tail=tail, hidden=hidden)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        state = self.__dict__
        state["call"] = args, kwargs
        given = hidden_states if state["hidden"] is None else state["hidden"]
        return given if state["tail"] is None else (given, *state["tail"])


class _Recorder(_StandIn):
    """Runs the block and remembers what it read and what it answered beside a hidden state."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        result = self.__dict__["block"](hidden_states, *args, **kwargs)
        tail = tuple(result[1:]) if isinstance(result, tuple | list) else None
        self.__dict__.update(hidden=hidden_states, tail=tail)
        return result


def _constant(value: Any) -> bool:  # noqa: ANN401
    """Say whether nobody changes a value that a block is given."""
    if isinstance(value, tuple | list | dict):
        return all(map(_constant, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, bool | int | float | str | Tensor)


class StackRunner:
    """The blocks of one stack, each of which can be run by itself."""

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
        # What a block answers beside the hidden state (T5's position bias), by batch shape; the
        # blocks after the first one read it from the one before them.
        self._tails: dict[torch.Size, tuple | None] = {}
        self._like: tuple | None = None  # what the last call was for
        self._call: tuple[tuple, dict[str, Any]] = (), {}

    @property
    def features(self) -> int:
        """Width of the embeddings that the stack is called with."""
        return self.model.get_input_embeddings().weight.shape[1]  # pyright: ignore

    @property
    def simple(self) -> bool:
        """Whether blocks answer hidden states alone."""
        return not any(self._tails.values())

    @torch.no_grad()
    def enter(self, ids: Int[Tensor, "B T"], context: Context) -> Float[Tensor, "B T D"]:
        """Return what the first block reads; runs the embeddings and, for its form, that block."""
        recorder = _Recorder(self.blocks[0])
        with self._only([recorder]):
            self.module(input_ids=ids, **context)
        hidden = recorder.__dict__["hidden"]
        self._tails[hidden.shape[:2]] = recorder.__dict__["tail"]
        return hidden

    @torch.no_grad()
    def bind(
        self,
        index: int,
        hidden: Float[Tensor, "B T D"],
        context: Context,
        block: Callable[..., Any] | None = None,
    ) -> Callable[[], Float[Tensor, "B T D"]]:
        """Return the call of block ``index`` on ``hidden``, with all that the model gives it.

        The call may be made later; it returns the hidden state after the block. ``block`` is run in
        its place, if there is one.
        """
        args, kwargs = self._given(index, hidden, context)
        block = block or self.blocks[index]

        def call() -> Tensor:
            result = block(hidden, *args, **kwargs)
            return result[0] if isinstance(result, tuple | list) else result

        return call

    def _given(self, index: int, hidden: Tensor, context: Context) -> tuple[tuple, dict[str, Any]]:
        """Return what else the model gives a block: the same for batches of a size."""
        like = index, hidden.shape, hidden.dtype
        if not context and like == self._like:
            return self._call
        passing = self._passing(index + 1, hidden)
        with self._only(passing):
            self.module(inputs_embeds=self._blank(hidden), **context)
        self._call = passing[-1].__dict__["call"]
        # A cache would grow with each call.
        self._like = None if context or not _constant(self._call) else like
        return self._call

    @torch.no_grad()
    def finish(self, hidden: Float[Tensor, "B T D"], context: Context) -> Tensor:
        """Return the stack's last hidden state: what follows the blocks, such as a final norm."""
        with self._handing(hidden):
            return self.module(inputs_embeds=self._blank(hidden), **context)[0]

    @torch.inference_mode()
    def head(self, hidden: Float[Tensor, "B T D"], context: Context | None = None) -> Tensor:
        """Return what the whole model answers (a language model: logits) to the last hidden state.

        Final norm and head look at each position by itself in a decoder, so any cut of the tokens
        may be handed in.
        """
        blank = self._blank(hidden)
        with self._handing(hidden):
            if not context:
                return self.model(inputs_embeds=blank)[0]
            read = (context["encoder_hidden_states"],)
            return self.model(encoder_outputs=read, decoder_inputs_embeds=blank)[0]

    def _blank(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(1).expand(*hidden.shape[:2], self.features)

    def _passing(self, count: int, hidden: Tensor) -> list[nn.Module]:
        tail = self._tails.get(hidden.shape[:2], next(iter(self._tails.values()), None))
        return [_PassThrough(block, tail) for block in self.blocks[:count]]

    @contextmanager
    def _handing(self, hidden: Tensor) -> Iterator[None]:
        passing = self._passing(len(self.blocks), hidden)
        passing[-1].__dict__["hidden"] = hidden
        with self._only(passing):
            yield

    @contextmanager
    def _only(self, blocks: list[nn.Module]) -> Iterator[None]:
        original = getattr(self._owner, self._attribute)
        setattr(self._owner, self._attribute, nn.ModuleList(blocks))
        try:
            yield
        finally:
            setattr(self._owner, self._attribute, original)
