"""Outlier-aware salience: activation times gradient, plus the kurtosis of weights.

Shapes: B samples of a batch, T tokens, I inputs of a linear, U units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from prunekit.models.units.heads_neurons import LinearUnitGroup
    from prunekit.structured.batches import Batch


class Salience(Ranker):
    """``(Σ|h|) · (Σ|∂L/∂h|) + √Kurt`` of a unit's output h (Zhao et al., APT, arXiv:2401.12200).

    The sums run over the inputs of the unit and the tokens of a window, each separately (eq. 5); L
    is the mean loss of the window. Kurt is the excess kurtosis of the weights that read the unit,
    each times its mean input in the window, clamped at 0. The score is the mean over all windows:
    like the authors' code, which adds √Kurt in each training batch, since sums over all tokens
    would outgrow it.

    A window holds whole samples, and its Σ|h| is scaled to the tokens of a full one. So scores
    depend neither on the batches into which samples are cut nor on the number of ranks.
    """

    name: ClassVar[str] = "salience"
    needs_loss: ClassVar[bool] = True

    product: Literal["sums", "elements"] = "sums"
    """Product of the two sums; "elements": ``Σ|h g|``."""

    window: int = Field(default=4096, gt=0)
    """Tokens of a window: about those of a training batch of the authors."""

    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """β of a running mean ``S̄ ← β S̄ + (1 − β) S`` over the windows, 0.85 in the authors' code; 0 is
    the mean of all windows."""

    outliers: bool = True
    """False omits the kurtosis."""

    @override
    def score(self, gated: GatedModel) -> Scores:
        windows = _Windows(self, gated)
        for batch in gated.batches:
            windows.add(batch)
        return windows.scores()

    def window_score(
        self, window: _Window, group: LinearUnitGroup, moments: Float[Tensor, "10 I"]
    ) -> Float[Tensor, " U"]:
        """Return the score of each unit within one window, float64.

        Args:
            window: The sums of the window.
            group: The units.
            moments: Moments of the weights that read them.
        """
        from prunekit_kernels import apt_score

        state = window.states[group.name].clone()
        state[5] *= self.window / state[0].clamp_min(1)
        state[6:8] /= max(window.predictions, 1.0)
        return apt_score(state, moments, width=group.features_per_unit, product=self.product)

    def window_weights(self, tokens: Sequence[int]) -> list[float]:
        """Return the weight of each window in the mean, given its tokens."""
        if not self.smoothing:
            return [count / max(sum(tokens), 1) for count in tokens]
        last = len(tokens) - 1
        decays = [self.smoothing ** (last - number) for number in range(len(tokens))]
        return [decays[0], *((1 - self.smoothing) * decay for decay in decays[1:])]


def token_windows(tokens: Sequence[int], size: int) -> list[int]:
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


@dataclass
class _Window:
    """Sums over the tokens of a window that were seen so far.

    Attributes:
        states: State of :func:`prunekit_kernels.salience` for each group, by its name.
        predictions: Number of predictions in the loss.
    """

    states: dict[str, Tensor] = field(default_factory=dict)
    predictions: float = 0.0


class _Windows:
    """Windows over the samples of all ranks.

    Each rank adds its own samples.
    """

    def __init__(self, ranker: Salience, gated: GatedModel) -> None:
        self._ranker, self._gated = ranker, gated
        tokens = [int(count) for batch in gated.batches for count in _tokens(batch)]
        every = gated.ranks.all_gather_object(tokens)
        numbers = token_windows([*chain(*every)], ranker.window)
        sizes = [0] * (numbers[-1] + 1)
        for number, count in zip(numbers, chain(*every), strict=True):
            sizes[number] += count
        self._weights = ranker.window_weights(sizes)
        order = iter(numbers)
        of_ranks = Counter(chain(*({next(order) for _ in each} for each in every)))
        self._shared = {number for number, ranks in of_ranks.items() if ranks > 1}
        first = sum(map(len, every[: gated.ranks.rank]))
        self._order = iter(numbers[first : first + len(tokens)])
        self._open: dict[int, _Window] = {}
        self._moments = {group.name: self._moments_of(group) for group in gated.groups}
        self._totals = {group.name: _zeros(group.units) for group in gated.groups}

    def add(self, batch: Batch) -> None:
        """Run the next batch and add its samples to their windows."""
        from prunekit_kernels import new_state, salience

        from prunekit.structured.batches import valid_tokens
        from prunekit.structured.probes.reader_inputs import inputs_and_gradients

        inputs, gradients, predictions = inputs_and_gradients(self._gated, batch, outputs=False)
        for number, samples in self._parts(len(batch["input_ids"])):
            self._finish(number)
            window = self._open.setdefault(number, _Window())
            window.predictions += float(predictions[samples].sum())
            for group, h, g in zip(self._gated.groups, inputs, gradients, strict=True):
                valid = valid_tokens(batch, decodes=group.stack.reads is not None)
                if group.name not in window.states:
                    columns = self._moments[group.name].shape[1]
                    window.states[group.name] = new_state(columns, h.device)
                salience(
                    _rows(h, samples, len(predictions)),
                    _rows(g, samples, len(predictions)),
                    window.states[group.name],
                    None if valid is None else valid[samples].flatten(),
                )

    def scores(self) -> Scores:
        """Return the scores after the last batch, float64 on the CPU."""
        self._finish(len(self._weights))
        self._merge_shared()
        self._gated.all_reduce_sums(self._totals.values())
        return self._totals

    def _parts(self, count: int) -> Iterator[tuple[int, slice]]:
        """Yield the windows of the next samples, with their samples."""
        start = 0
        numbers = [next(self._order) for _ in range(count)]
        for number, samples in groupby(numbers):
            stop = start + len([*samples])
            yield number, slice(start, stop)
            start = stop

    def _finish(self, number: int) -> None:
        """Score windows before a number, unless other ranks share them."""
        for done in [each for each in self._open if each < number and each not in self._shared]:
            self._score(done, self._open.pop(done))

    def _merge_shared(self) -> None:
        """Merge shared windows in rank order; rank 0 scores them."""
        from prunekit_kernels import merge

        if not self._shared:
            return
        for window in self._open.values():
            window.states = {name: state.cpu() for name, state in window.states.items()}
        every = self._gated.ranks.all_gather_object(self._open)
        if not self._gated.ranks.is_main:
            return
        for number in sorted(self._shared):
            whole, *parts = (each[number] for each in every if number in each)
            for part in parts:
                whole.predictions += part.predictions
                for name, state in whole.states.items():
                    merge(state, part.states[name])
            self._score(number, whole)

    def _score(self, number: int, window: _Window) -> None:
        """Add the scores of a window to the totals."""
        for group in self._gated.groups:
            moments = self._moments[group.name]
            window.states[group.name] = window.states[group.name].to(moments.device)
            found = self._ranker.window_score(window, group, moments).cpu()
            self._totals[group.name] += self._weights[number] * found

    def _moments_of(self, group: LinearUnitGroup) -> Tensor:
        """Return the moments of the weights that read a group.

        Without ``outliers`` they are those of no weight.
        """
        from prunekit_kernels import new_state, weight_moments

        from prunekit.models.orientation import weight_matrix

        weight = weight_matrix(group.reader.linear).detach()
        if not self._ranker.outliers:
            return new_state(weight.shape[1], weight.device)
        return weight_moments(weight.float())


def _zeros(units: int) -> Tensor:
    import torch

    return torch.zeros(units, dtype=torch.float64)


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
