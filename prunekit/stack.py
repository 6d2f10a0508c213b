"""Runs one block of a model inside the model itself.

The blocks before it pass through, those after it are left out, and the model's own ``forward``
is called: masks, rotary embeddings, layer types, position biases and cross-attention are what the
model computes, so no family needs a driver of its own.

Shapes: B samples, T tokens, D features of the hidden state.
"""

from collections.abc import Iterator
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
    """Gives back what it is given, in the form in which the block answers."""

    def __init__(self, block: nn.Module, tail: tuple | None) -> None:
        super().__init__(block)
        self.__dict__["tail"] = tail

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        tail = self.__dict__["tail"]
        return hidden_states if tail is None else (hidden_states, *tail)


class _Entry(_StandIn):
    """Runs the block on ``hidden`` (or on what arrives) and remembers both ends."""

    def __init__(self, block: nn.Module, hidden: Tensor | None) -> None:
        super().__init__(block)
        self.__dict__["hidden"] = hidden

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        state = self.__dict__
        if state["hidden"] is None:
            state["hidden"] = hidden_states
        result = state["block"](state["hidden"], *args, **kwargs)
        state["tail"] = tuple(result[1:]) if isinstance(result, tuple | list) else None
        state["out"] = result if state["tail"] is None else result[0]
        return result


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

    @property
    def features(self) -> int:
        """Width of the embeddings that the stack is called with."""
        return self.model.get_input_embeddings().weight.shape[1]  # pyright: ignore

    @torch.inference_mode()
    def enter(self, ids: Int[Tensor, "B T"], context: Context) -> Float[Tensor, "B T D"]:
        """Return what the first block reads; runs the embeddings and, for its form, that block."""
        entry = _Entry(self.blocks[0], None)
        with self._only([entry]):
            self.module(input_ids=ids, **context)
        hidden = entry.__dict__["hidden"]
        self._tails[hidden.shape[:2]] = entry.__dict__["tail"]
        return hidden

    @torch.inference_mode()
    def run(self, index: int, hidden: Float[Tensor, "B T D"], context: Context) -> Tensor:
        """Return the hidden state after block ``index``, given the one before it."""
        entry = _Entry(self.blocks[index], hidden)
        with self._only([*self._passing(index, hidden), entry]):
            self.module(inputs_embeds=self._blank(hidden), **context)
        return entry.__dict__["out"]

    @torch.inference_mode()
    def finish(self, hidden: Float[Tensor, "B T D"], context: Context) -> Tensor:
        """Return the stack's last hidden state: what follows the blocks, such as a final norm."""
        with self._handing(hidden):
            return self.module(inputs_embeds=self._blank(hidden), **context)[0]

    @torch.inference_mode()
    def head(self, hidden: Float[Tensor, "B T D"], **inputs: Any) -> Tensor:  # noqa: ANN401
        """Return what the whole model answers (a language model: logits) to the last hidden state.

        Final norm and head look at each position by itself in a decoder, so any cut of the tokens
        may be handed in.
        """
        inputs = inputs or {"inputs_embeds": self._blank(hidden)}
        with self._handing(hidden):
            return self.model(**inputs)[0]

    def _blank(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(1).expand(*hidden.shape[:2], self.features)

    def _passing(self, count: int, hidden: Tensor) -> list[nn.Module]:
        tail = self._tails.get(hidden.shape[:2], next(iter(self._tails.values()), None))
        return [_PassThrough(block, tail) for block in self.blocks[:count]]

    @contextmanager
    def _handing(self, hidden: Tensor) -> Iterator[None]:
        *first, last = self._passing(len(self.blocks), hidden)
        handing = _Entry(last, hidden)
        with self._only([*first, handing]):
            yield

    @contextmanager
    def _only(self, blocks: list[nn.Module]) -> Iterator[None]:
        original = getattr(self._owner, self._attribute)
        setattr(self._owner, self._attribute, nn.ModuleList(blocks))
        try:
            yield
        finally:
            setattr(self._owner, self._attribute, original)
