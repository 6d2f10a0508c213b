"""Tokenized samples of unlike lengths, and their batches.

``batches`` and ``batches_of`` pad: the whole model runs, with a mask. ``even_batches`` hold samples
of one length: blocks are run on them without a mask, and statistics of their inputs hold no
padding. Samples of similar length share a batch; the batches are in random order. They are
formed from all samples, so that they do not depend on the number of processes, each of which takes
consecutive samples.

Shapes: B samples of a batch, T tokens.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100
"""Label of positions that are not predicted."""
Sample = Mapping[str, int | Sequence[int]]
"""Token ids and labels of one sample, by their name in a call of the model; a class is a number."""
FILLING = {"labels": IGNORED, "token_type_ids": 0}
"""Value of padding by name; token ids are filled with the padding token of the model."""

Fits = Callable[[Sequence[tuple[int, ...]]], bool]
"""Returns whether samples of these ascending lengths may share a batch."""


@dataclass(frozen=True)
class Samples:
    """Tokenized samples in random order.

    Attributes:
        rows: The samples, without padding.
        pad: Token id that fills shorter samples of a batch.
        description: Source and number of samples, for reports.
        seed: Seed of the order of batches; None: in the order of their lengths.
    """

    rows: Sequence[Sample]
    pad: int
    description: str
    seed: int | None = 0

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the samples."""
        return hashlib.sha256(json.dumps([*map(dict, self.rows)]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def tokens(self) -> int:
        """Number of input tokens, without padding."""
        return sum(lengths[0] for lengths in self._lengths)

    @cached_property
    def longest(self) -> int:
        """Largest number of input tokens of a sample."""
        return max(lengths[0] for lengths in self._lengths)

    def part(self, chosen: slice) -> "Samples":
        """Return some of the samples."""
        return Samples(self.rows[chosen], self.pad, self.description, self.seed)

    def batches(self, tokens: int, share: slice | None = None) -> list[dict[str, Tensor]]:
        """Return padded batches of at most ``tokens`` positions, padding included.

        ``share``: the samples to return, as a slice of all in their order of batches.
        """
        return self._padded(_within(tokens), share)

    def batches_of(self, samples: int) -> list[dict[str, Tensor]]:
        """Return padded batches of ``samples`` samples; one may have fewer."""
        return self._padded(lambda lengths: len(lengths) <= samples, None)

    def even_batches(self, tokens: int, share: slice | None = None) -> list[dict[str, Tensor]]:
        """Return batches without padding, of at most ``tokens`` positions.

        ``share`` as for :meth:`batches`.
        """
        fits = _within(tokens)
        groups = self._groups(lambda lengths: lengths[0] == lengths[-1] and fits(lengths))
        return [self._batch(numbers) for numbers in _shared(groups, share)]

    def _padded(self, fits: Fits, share: slice | None) -> list[dict[str, Tensor]]:
        """Return batches with masks of the tokens that are no padding."""
        batches = []
        for numbers in _shared(self._groups(fits), share):
            counts = torch.tensor([self._lengths[number][0] for number in numbers])
            mask = torch.arange(int(counts.max())) < counts[:, None]
            batches.append({**self._batch(numbers), "attention_mask": mask.long()})
        return batches

    def _batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        rows = [self.rows[number] for number in numbers]
        return {name: self._tensor(name, [row[name] for row in rows]) for name in rows[0]}

    def _tensor(self, name: str, values: Sequence[int | Sequence[int]]) -> Tensor:
        """Return numbers as [B], lists of numbers padded as [B, T]."""
        if isinstance(values[0], int):
            return torch.tensor(values)
        fill = FILLING.get(name, self.pad)
        rows = [torch.tensor(value) for value in values]
        return pad_sequence(rows, batch_first=True, padding_value=fill)

    @cached_property
    def _lengths(self) -> list[tuple[int, ...]]:
        """Numbers of input and decoder tokens of each sample."""
        return [
            tuple(
                len(value)
                for name in ("input_ids", "labels", "decoder_input_ids")
                if isinstance(value := row.get(name), Sequence)
            )
            for row in self.rows
        ]

    def _groups(self, fits: Fits) -> list[list[int]]:
        """Return the numbers of the samples of each batch."""
        groups: list[list[int]] = []
        for number in sorted(range(len(self.rows)), key=self._lengths.__getitem__):
            larger = [*groups[-1], number] if groups else []
            if larger and fits([self._lengths[each] for each in larger]):
                groups[-1] = larger
            else:
                groups.append([number])
        if self.seed is not None:
            random.Random(self.seed).shuffle(groups)
        return groups


def _within(tokens: int) -> Fits:
    return lambda lengths: len(lengths) * max(map(max, lengths)) <= tokens


def _shared(groups: Sequence[list[int]], share: slice | None) -> Iterator[list[int]]:
    """Yield each batch's samples that are in a slice of all."""
    first = 0
    for group in groups:
        start, stop = (share.start, share.stop) if share else (first, first + len(group))
        if part := group[max(start - first, 0) : max(stop - first, 0)]:
            yield part
        first += len(group)
