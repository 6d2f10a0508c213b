"""Activations and gradients summed in windows of tokens.

A window holds whole samples, in their order over all ranks. So it depends neither on the batches
into which the samples are cut nor on the number of ranks.

Shapes: B samples of a batch, T tokens, I inputs of a module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import TYPE_CHECKING, NamedTuple

from prunekit_kernels import merge, new_state, salience
from torch import Tensor, nn

from prunekit.structured.batches import Batch, valid_tokens
from prunekit.structured.probes.reader_inputs import activations_and_gradients

if TYPE_CHECKING:
    from prunekit.structured.gated_model import GatedModel


class Observed(NamedTuple):
    """A module whose input is observed; ``decodes``: of a decoder with cross-attention."""

    module: nn.Module
    decodes: bool


@dataclass
class Window:
    """Sums over the tokens of a window that were seen so far.

    Attributes:
        states: State of :func:`prunekit_kernels.salience` for each module, [10 I]. The gradients
            are those of the loss summed over the predictions: they are not divided, so that half
            precision does not lose them.
        predictions: Number of predictions in the loss.
    """

    states: list[Tensor] = field(default_factory=list)
    predictions: float = 0.0


class TokenWindows:
    """Windows over the samples of all ranks.

    Attributes:
        tokens: Tokens of each window.
    """

    def __init__(self, gated: GatedModel, modules: Sequence[Observed], size: int) -> None:
        """Divide the samples among windows; nothing is run yet.

        Args:
            gated: The model and the batches of this rank.
            modules: The modules that are observed.
            size: Tokens of a window.
        """
        self._gated, self._modules = gated, modules
        own = [int(count) for batch in gated.batches for count in _tokens(batch)]
        every = gated.ranks.all_gather_object(own)
        numbers = window_numbers([*chain(*every)], size)
        self.tokens = [0] * (numbers[-1] + 1)
        for number, count in zip(numbers, chain(*every), strict=True):
            self.tokens[number] += count
        order = iter(numbers)
        of_ranks = Counter(chain(*({next(order) for _ in each} for each in every)))
        self._shared = {number for number, ranks in of_ranks.items() if ranks > 1}
        first = sum(map(len, every[: gated.ranks.rank]))
        self._numbers = numbers[first : first + len(own)]

    def __iter__(self) -> Iterator[tuple[int, Window]]:
        """Run the batches; yield each window on one of the ranks."""
        window_of, opened = iter(self._numbers), dict[int, Window]()
        for batch in self._gated.batches:
            of_samples = [next(window_of) for _ in range(len(batch["input_ids"]))]
            self._add(batch, of_samples, opened)
            yield from self._finished(opened, before=of_samples[-1])
        yield from self._finished(opened, before=len(self.tokens))
        yield from self._merged(opened)

    def _add(self, batch: Batch, of_samples: list[int], opened: dict[int, Window]) -> None:
        """Run a batch and add its samples to their windows.

        Args:
            batch: The batch.
            of_samples: Number of the window of each sample.
            opened: Windows with samples so far, by number.
        """
        modules = [each.module for each in self._modules]
        inputs, gradients, predictions = activations_and_gradients(self._gated, batch, modules)
        masks = {decodes: valid_tokens(batch, decodes=decodes) for _, decodes in self._modules}
        start = 0
        for number, samples in groupby(of_samples):
            part = slice(start, start := start + len([*samples]))
            window = opened.setdefault(number, Window())
            window.predictions += float(predictions[part].sum())
            if not window.states:
                window.states = [new_state(h.shape[-1], h.device) for h in inputs]
            for each, h, g, state in zip(
                self._modules, inputs, gradients, window.states, strict=True
            ):
                valid = masks[each.decodes]
                salience(
                    _rows(h, part, len(predictions)),
                    _rows(g, part, len(predictions)),
                    state,
                    None if valid is None else valid[part].flatten().to(h.device),
                    moments=False,  # the kurtosis is of weights
                )

    def _finished(self, opened: dict[int, Window], before: int) -> Iterator[tuple[int, Window]]:
        """Yield windows that no other rank shares, of numbers below ``before``."""
        for number in [*opened]:
            if number < before and number not in self._shared:
                yield number, opened.pop(number)

    def _merged(self, opened: dict[int, Window]) -> Iterator[tuple[int, Window]]:
        """Yield shared windows, merged in the order of ranks, on rank 0."""
        if not self._shared:
            return
        for window in opened.values():
            window.states = [state.cpu() for state in window.states]
        every = self._gated.ranks.all_gather_object(opened)
        if not self._gated.ranks.is_main:
            return
        for number in sorted(self._shared):
            whole, *parts = (each[number] for each in every if number in each)
            for part in parts:
                whole.predictions += part.predictions
                for state, other in zip(whole.states, part.states, strict=True):
                    merge(state, other)
            yield number, whole


def window_numbers(tokens: Sequence[int], size: int) -> list[int]:
    """Return the number of the window of each sample.

    A window ends with the sample that fills it; a last one less than half full joins the one before
    it.

    Args:
        tokens: Tokens of each sample, in order.
        size: Tokens of a window.
    """
    windows, number, filled = [], 0, 0
    for count in tokens:
        windows.append(number)
        filled += count
        if filled >= size:
            number, filled = number + 1, 0
    if number and 2 * filled < size:
        return [min(window, number - 1) for window in windows]
    return windows


def _tokens(batch: Batch) -> list[int]:
    """Return the number of input tokens of each sample, padding excepted."""
    mask = batch.get("attention_mask")
    samples, length = batch["input_ids"].shape
    return [length] * samples if mask is None else mask.sum(1).tolist()


def _rows(values: Tensor, samples: slice, count: int) -> Tensor:
    """Return the rows of some of ``count`` samples.

    Some models flatten samples and tokens into one axis.
    """
    rows = values.flatten(0, -2)
    each = len(rows) // count
    return rows[samples.start * each : samples.stop * each]
