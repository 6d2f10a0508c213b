"""Tokenization of labelled rows: one row a sample, as stock transformers does."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from prunekit.data.labelled import Example, LabelledTask
from prunekit.data.samples import Sample, Samples
from prunekit.data.sources import Tokenizer, title
from prunekit.errors import ConfigError


@dataclass(frozen=True)
class LabelledData:
    """Labelled rows of some sources, as one model reads them.

    Attributes:
        task: The task.
        tokenizer: Tokenizer of the model.
        sources: Files or data sets, see :mod:`prunekit.data.labelled`.
        length: Most tokens of a text; the rest of a longer one is cut off.
    """

    task: LabelledTask
    tokenizer: Tokenizer
    sources: Sequence[str]
    length: int

    def sample(self, count: int | None, seed: int) -> Samples:
        """Return rows chosen at random, at most ``count`` if it is set.

        Raises:
            ConfigError: A source or a row is invalid, or the model lacks a token of it.
        """
        rows = self.task.examples(self.sources)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(rows), generator=generator)[:count].tolist()
        chosen = [rows[number] for number in order]
        return self._samples(chosen, _share(len(chosen), len(rows), ""), seed)

    def first(self, count: int | None = None) -> Samples:
        """Return the first rows, or all, in their order.

        Raises:
            ConfigError: A source or a row is invalid, or the model lacks a token of it.
        """
        rows = self.task.examples(self.sources)
        chosen = rows[:count]
        return self._samples(chosen, _share(len(chosen), len(rows), "the first "), None)

    def _samples(self, rows: Sequence[Example], which: str, seed: int | None) -> Samples:
        encoder = _Encoder(self.task, self.tokenizer, self._length())
        encoded = encoder.encode(rows)
        notes = [f"{which} of {', '.join(map(title, self.sources))}"]
        if encoder.cut:
            texts = "text is" if encoder.cut == 1 else "texts are"
            notes.append(f"{encoder.cut} longer {texts} cut off at {encoder.length} tokens")
        if seed is not None:
            notes.append(f"seed {seed}")
        return Samples(encoded, self.task.pad, ", ".join(notes), seed or 0)

    def _length(self) -> int:
        """Return the most tokens of a text, without special tokens."""
        length = min(self.length, self.tokenizer.model_max_length)
        special = self.tokenizer.num_special_tokens_to_add(pair=self.task.name != "seq2seq")
        if length <= special:
            raise ConfigError(
                f"length: {length} tokens of a sample hold the {special} special ones and no text."
            )
        return length


def _share(count: int, total: int, which: str) -> str:
    return f"{which}{count:,} of {total:,} rows" if count < total else f"{total:,} rows"


@dataclass
class _Encoder:
    """Tokenizes rows and counts the texts that are cut off."""

    task: LabelledTask
    tokenizer: Tokenizer
    length: int
    cut: int = field(default=0, init=False)

    def encode(self, rows: Sequence[Example]) -> list[Sample]:
        """Return the samples, with their labels."""
        pairs = [row.pair for row in rows]
        texts: list[Any] = [[row.text for row in rows]]
        if any(pair is not None for pair in pairs):
            texts.append([pair or "" for pair in pairs])
        inputs = self._tokens(rows, *texts)
        names = ["input_ids", *["token_type_ids"] * self.task.has_token_types]
        samples: list[Sample] = [
            {name: inputs[name][number] for name in names if name in inputs}
            for number in range(len(rows))
        ]
        labels: Sequence[Any] = [row.target for row in rows]
        if self.task.name == "seq2seq":
            labels = self._tokens(rows, text_target=[*labels])["input_ids"]
        return [{**sample, "labels": label} for sample, label in zip(samples, labels, strict=True)]

    def _tokens(self, rows: Sequence[Example], *texts: Any, **options: Any) -> Any:  # noqa: ANN401
        """Return the tokens of each row, cut off and checked."""
        # verbose=False: texts that are too long are counted here.
        found = self.tokenizer(*texts, **options, verbose=False)
        if longer := sum(len(ids) > self.length for ids in found["input_ids"]):
            self.cut += longer
            found = self.tokenizer(*texts, **options, truncation=True, max_length=self.length)
        for row, ids in zip(rows, found["input_ids"], strict=True):
            if not ids:
                raise ConfigError(f"{row.where}: the tokenizer makes no token of a text")
            if max(ids) >= self.task.vocabulary:
                raise ConfigError(
                    f"{row.where}: the tokenizer makes token {max(ids)}, but the model knows 0 to "
                    f"{self.task.vocabulary - 1}. Give the model as many embeddings as its "
                    "tokenizer has tokens"
                )
        return found
