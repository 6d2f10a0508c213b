"""Further inputs of a stack, and values shared by its blocks."""

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

from prunekit.models.sequential.recorded_calls import RecordedCalls


class Context(dict[str, Tensor]):
    """Further inputs of a stack for one batch.

    ``encoder_hidden_states`` of a decoder after an encoder, ``input_ids`` of a stack that does not
    run from embeddings.

    Attributes:
        shared: Dictionaries that blocks fill for later ones, by name of the argument.
        tails: Further outputs of blocks that the next one reads, by number of the block.
        recorded: Arguments of the blocks, for a batch whose inputs are more than tokens.
    """

    def __init__(self, inputs: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(inputs or {})
        self.shared: dict[str, MutableMapping[Any, Any]] = {}
        self.tails: dict[int, tuple[Any, ...] | None] = {}
        self.recorded: RecordedCalls | None = None

    def share(self, name: str, value: Any) -> Any:  # noqa: ANN401
        """Return a block's argument, the batch's own if blocks fill it.

        Args:
            name: Name of the argument.
            value: Argument of the model; blocks fill a dictionary that is empty.
        """
        if isinstance(value, MutableMapping) and not value:
            return self.shared.setdefault(name, copy.copy(value))
        return value

    def hand_on(self, index: int, tail: tuple[Any, ...] | None) -> None:
        """Keep a block's further outputs until the next has run.

        Args:
            index: Number of the block.
            tail: Its outputs after the hidden states; None if it returns these alone.
        """
        self.tails[index] = tail
        self.tails.pop(index - 2, None)
