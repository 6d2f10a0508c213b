"""Modules in the place of blocks, and blank embeddings.

Shapes: T tokens, D features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput


class EncoderOutput(BaseModelOutput):
    """Hidden states of an encoder, without its other outputs."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class BlockProxy(nn.Module):
    """Replaces a block; attributes that the model reads are the block's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: its weights must not be seen twice

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.__dict__["block"], name)


class PassThrough(BlockProxy):
    """Returns its input, or ``hidden``, in the form of the block's output.

    It records its other arguments.
    """

    def __init__(self, block: nn.Module, tail: tuple | None, hidden: Tensor | None = None) -> None:
        super().__init__(block)
        self.__dict__.update(tail=tail, hidden=hidden)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Return the hidden states."""
        state = self.__dict__
        state["call"] = args, kwargs
        output = hidden_states if state["hidden"] is None else state["hidden"]
        return output if state["tail"] is None else (output, *state["tail"])


class Follower(BlockProxy):
    """Returns its input in the form of a recorded output."""

    def __init__(self, block: nn.Module, recorder: "Recorder") -> None:
        super().__init__(block)
        self.__dict__["recorder"] = recorder

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        """Return the hidden states."""
        tail = self.__dict__["recorder"].__dict__["tail"]
        return hidden_states if tail is None else (hidden_states, *tail)


class Recorder(BlockProxy):
    """Runs the block; records its input and further outputs."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Return the output of the block."""
        result = self.__dict__["block"](hidden_states, *args, **kwargs)
        tail = tuple(result[1:]) if isinstance(result, tuple | list) else None
        self.__dict__.update(hidden=hidden_states, tail=tail)
        return result


def _zeros(like: Tensor, width: int, ids: Tensor | torch.Size, *_: object, **__: object) -> Tensor:
    # Tables of positions are given the shape of the tokens, and return [T, D].
    shape = ids.shape if isinstance(ids, Tensor) else ids[-1:]
    return like.new_zeros(*shape, width)


@contextmanager
def blank_embeddings(model: nn.Module, like: Tensor) -> Iterator[None]:
    """Let tables of embeddings, which may have no weights now, return zeros."""
    tables: list[Any] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for table in tables:
        table.forward = partial(_zeros, like, table.weight.shape[1])
    try:
        yield
    finally:
        for table in tables:
            del table.forward
