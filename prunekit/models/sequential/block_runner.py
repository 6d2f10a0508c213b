"""Run one block of a model inside the model itself.

The blocks before it pass their input through, those after it are removed, and the model's own
``forward`` is called: it computes masks, rotary embeddings, layer types, position biases and
cross-attention, so no model family needs a driver of its own.

Shapes: B samples, T tokens, D features of the hidden state.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.architectures import Stack
from prunekit.architectures.block_lists import find_block_lists, own_embeddings
from prunekit.architectures.forward_trace import FORWARD_ERRORS
from prunekit.errors import ConfigError, is_out_of_memory
from prunekit.models.sequential.block_proxies import (
    EncoderOutput,
    Follower,
    PassThrough,
    Recorder,
    blank_embeddings,
)
from prunekit.models.sequential.context import Context
from prunekit.models.sequential.recorded_calls import (
    Answer,
    Caller,
    check_added,
    ended_before,
    in_place_of_blocks,
    record_calls,
    to_run,
    without_cache,
)


def _is_constant(value: Any) -> bool:  # noqa: ANN401
    """Return whether an argument of a block cannot change between calls."""
    if isinstance(value, tuple | list | dict):
        return all(map(_is_constant, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _shapes(hidden: Tensor, context: Mapping[str, Tensor]) -> tuple[torch.Size, ...]:
    """Return numbers of samples and tokens of a stack's inputs."""
    encoded = context.get("encoder_hidden_states")
    return (hidden.shape[:2], *([] if encoded is None else [encoded.shape[:2]]))


class StackRunner:
    """The blocks of one stack, each of which can run by itself."""

    def __init__(self, model: PreTrainedModel, stack: Stack) -> None:
        self.model = model
        self.stack = stack
        base = cast("PreTrainedModel", model.base_model)
        self.module: nn.Module = base.get_submodule(stack.module)
        self._only_adds = False  # it was checked that the model only adds to hidden states
        # A forward that records a tower ends where the text begins.
        text = find_block_lists(base)[-1].blocks if stack.tower else ""
        self._beyond = next(base.get_submodule(text).children()) if text else None
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
        """Width of the stack's embeddings, or of a tower's hidden states."""
        if self.stack.tower:
            return self.stack.tower
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
        recorder = Recorder(self.blocks[0])
        following: list[nn.Module] = [Follower(block, recorder) for block in self.blocks[1:]]
        # All of them: a model may choose their kind of attention by the number of tokens.
        with self._blocks_replaced([recorder, *following]):
            self.module(input_ids=ids, **context)
        hidden = self._samples_first(recorder.__dict__["hidden"])
        self._check_length(ids, hidden)
        self._tails[_shapes(hidden, context)] = recorder.__dict__["tail"]
        return hidden

    @torch.no_grad()
    def record(self, inputs: Mapping[str, Tensor], context: Context) -> Float[Tensor, "B T D"]:
        """Return the first block's input for a batch with images or sound.

        Runs the model once, but for the blocks after the first. What they are called with is kept
        in ``context``.

        Args:
            inputs: All inputs of the model.
            context: Gets the arguments of the blocks.

        Raises:
            ConfigError: The model does not run on these inputs, or its blocks cannot then run by
                themselves.
        """
        answer = Answer()
        callers = [Caller(block, answer) for block in self.blocks]
        like = next(self.blocks[0].parameters())
        self._run_recorded(callers, inputs, like)
        recorded = context.recorded = record_calls(callers, like.device)
        recorded.inputs = inputs
        if recorded.added and not self._only_adds:
            assert answer.hidden is not None
            generator = torch.Generator().manual_seed(0)
            other = torch.randn(answer.hidden.shape, generator=generator)
            first, answer.hidden = callers[0].hidden, other.to(answer.hidden)
            self._run_recorded(callers, inputs, like)
            check_added(callers, recorded)
            self._only_adds = True  # the same code runs for each batch
            callers[0].hidden = first
        return self._samples_first(callers[0].hidden)

    def _run_recorded(
        self, callers: Sequence[Caller], inputs: Mapping[str, Tensor], like: Tensor
    ) -> None:
        with (
            without_cache(self.model.config),
            in_place_of_blocks(callers),
            ended_before(self._beyond),
        ):
            try:
                self.module(**to_run(inputs, like))
            except FORWARD_ERRORS as error:
                if is_out_of_memory(error):
                    raise
                raise ConfigError(
                    f"calibration: {type(self.model).__name__} does not run on "
                    f"{', '.join(sorted(inputs))} of its processor ({error}). Calibrate on text."
                ) from error

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
        recorded = context.recorded
        args, kwargs = self._arguments(index, hidden, context)
        kwargs = {name: context.share(name, value) for name, value in kwargs.items()}
        block = block or self.blocks[index]

        def call() -> Tensor:
            result = block(self._as_called(hidden), *args, **kwargs)
            output, *rest = result if isinstance(result, tuple | list) else (result,)
            if self.stack.carries:
                context.hand_on(index, tuple(rest) or None)
            output = recorded.onward(index, output) if recorded else output
            return self._samples_first(output)

        return call

    def _arguments(
        self, index: int, hidden: Tensor, context: Context
    ) -> tuple[tuple, dict[str, Any]]:
        """Return the block's other arguments, the same for batches of one shape."""
        if context.recorded:
            return context.recorded[index]
        key = index, hidden.shape, hidden.dtype
        cacheable = not context and not self.stack.carries
        if cacheable and key == self._call_key:
            return self._call
        passing = self._pass_through(index + 1, hidden, context)
        for block in passing if index - 1 in context.tails else ():
            block.__dict__["tail"] = context.tails[index - 1]
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
            if isinstance(context, Context) and context.recorded:
                return self.module(**to_run(context.recorded.inputs, hidden))[0]
            if "input_ids" not in context:
                context = Context({"inputs_embeds": self._blank(hidden), **context})
            return self.module(**context)[0]

    def head(
        self, hidden: Float[Tensor, "B T D"], context: Mapping[str, Tensor] | None = None
    ) -> Tensor:
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
            given["encoder_outputs"] = EncoderOutput(encoded)
        prefix = "decoder_" if given else ""
        differentiable = hidden.requires_grad
        with torch.inference_mode(not differentiable), self._last_hidden(hidden, context or {}):
            if self.stack.reads_ids:
                ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
                with blank_embeddings(self.model, hidden):
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

    def _pass_through(
        self, count: int, hidden: Tensor, context: Mapping[str, Tensor]
    ) -> list[nn.Module]:
        tail = self._tails.get(_shapes(hidden, context), next(iter(self._tails.values()), None))
        return [PassThrough(block, tail) for block in self.blocks[:count]]

    @contextmanager
    def _last_hidden(self, hidden: Tensor, context: Mapping[str, Tensor]) -> Iterator[None]:
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
