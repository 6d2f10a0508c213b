"""Tokenization of text into fixed-length windows.

Documents are tokenized one by one and concatenated. Each begins with the special tokens that the
tokenizer or the chat template adds. If these add none and there are several documents, each begins
with ``<|endoftext|>`` if the tokenizer has it, else with BOS if it has one. So the tokens of a
single document (WikiText-2 as in the GPTQ, SparseGPT and Wanda papers) are exactly those of its
tokenizer.

Shapes: N windows, L tokens per window, T tokens in total.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import torch
from jaxtyping import Int64
from torch import Tensor

from prunekit.data.sources import SEPARATOR, Document, Tokenizer, check_sources, documents, title
from prunekit.errors import ConfigError

__all__ = ["Tokens", "calibration_tokens", "check_sources", "evaluation_tokens"]

# Calibration samples its windows from at least this much text, or 16 characters per token if that
# is more, and tokenizes no more than that: tokenizers were measured at about 1 MB/s per core.
MIN_CHARACTERS = 4 << 20
PASSAGE_CHARACTERS = 64 << 10


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids.

    Attributes:
        ids: The token ids.
        digest: SHA-256 of their shape and bytes.
        description: Source and number of windows, for reports.
        stride: Tokens from the start of a window to that of the next; None: they do not overlap.
    """

    ids: Int64[Tensor, "N L"]
    digest: str
    description: str
    stride: int | None = None

    @classmethod
    def of(cls, ids: Int64[Tensor, "N L"], description: str, stride: int | None = None) -> "Tokens":
        """Return the windows with their digest."""
        content = str(list(ids.shape)).encode() + ids.numpy().astype("<i8").tobytes()
        return cls(ids, hashlib.sha256(content).hexdigest(), description, stride)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Number of tokens of all windows."""
        return self.ids.numel()

    @property
    def longest(self) -> int:
        """Number of tokens of a window."""
        return self.ids.shape[1]

    def part(self, chosen: slice) -> "Tokens":
        """Return some of the windows."""
        return Tokens.of(self.ids[chosen], self.description, self.stride)

    def batches(self, tokens: int, share: slice | None = None) -> list[dict[str, Tensor]]:
        """Return batches of at most ``tokens`` tokens, at least one window each.

        ``share``: the windows to return.
        """
        own = self.ids if share is None else self.ids[share]
        return [{"input_ids": part} for part in own.split(max(1, tokens // self.longest))]

    even_batches = batches  # windows have one length

    def batches_of(self, samples: int) -> list[dict[str, Tensor]]:
        """Return batches of ``samples`` windows; the last one may have fewer."""
        return [{"input_ids": part} for part in self.ids.split(samples)]


def calibration_tokens(
    tokenizer: Tokenizer,
    sources: Sequence[str],
    samples: int,
    length: int,
    seed: int,
    *,
    limit: int | None = None,
) -> Tokens:
    """Sample windows at random positions, without overlap if the text suffices.

    With too little text the windows overlap, or are fewer or shorter; the description says so. Of
    a very long text, only a random sample of passages is tokenized.

    Args:
        tokenizer: Tokenizer of the model.
        sources: Entries of ``data``, see :mod:`prunekit.data.sources`.
        samples: Number of windows.
        length: Tokens per window.
        seed: Seed of the sampling.
        limit: Number of token ids that the model knows; None: they are not checked.

    Raises:
        ConfigError: A source cannot be read, or yields no tokens or one that the model lacks.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = _documents(tokenizer, sources)
    characters = max(MIN_CHARACTERS, 16 * samples * length)
    chosen = _sample_passages(texts, characters, generator)
    stream = _encode(tokenizer, chosen, sources, limit)
    total = len(stream.ids)
    length = min(length, total)
    starts = _window_starts(total, samples, length, generator)
    notes = [f"seed {seed}"]
    if chosen is not texts:
        notes.append(f"from {len(chosen)} passages chosen at random")
    if len(starts) * length > total:
        notes.append("overlapping, for want of text")
    names = ", ".join(map(title, sources))
    return Tokens.of(
        stream.ids.unfold(0, length, 1)[starts].contiguous(),
        f"{_counted(len(starts), 'window')} of {_counted(length, 'token')} from {names} "
        f"({total:,} tokens), {', '.join(notes)}",
    )


def evaluation_tokens(
    tokenizer: Tokenizer,
    sources: Sequence[str],
    length: int,
    windows: int | None = None,
    *,
    stride: int | None = None,
    limit: int | None = None,
) -> Tokens:
    """Split the text into windows, consecutive or overlapping.

    Each document is tokenized whole, as in the papers; an incomplete last window is dropped. A text
    shorter than one window becomes one shorter window.

    Args:
        tokenizer: Tokenizer of the model.
        sources: Entries of ``data``, see :mod:`prunekit.data.sources`.
        length: Tokens per window.
        windows: Number of windows from the start; None: all.
        stride: Tokens from the start of a window to that of the next; None, or as many as a window
            has: they do not overlap.
        limit: Number of token ids that the model knows; None: they are not checked.

    Raises:
        ConfigError: A source cannot be read, or yields no tokens or one that the model lacks.
    """
    texts = _documents(tokenizer, sources)
    stream = _encode(tokenizer, texts, sources, limit)
    requested, length = length, min(length, len(stream.ids))
    step = min(stride or length, length)
    full, rest = divmod(len(stream.ids) - length + step, step)
    kept = min(full, windows or full)
    overlaps = step < length
    counted = _counted(full, "window" if overlaps else "non-overlapping window")
    first = f"the first {kept} of " if kept < full else ""
    shorter = length < requested
    note = f"the text is shorter than {requested}" if shorter else f"remainder of {rest} dropped"
    apart = f", each {_counted(step, 'token')} after the one before" if overlaps else ""
    return Tokens.of(
        stream.ids.unfold(0, length, step)[:kept].clone(),
        f"{first}{counted} of {_counted(length, 'token')}{apart} ({note}) of "
        f"{', '.join(map(title, sources))}: {stream.description}",
        step if overlaps else None,
    )


@dataclass(frozen=True)
class _TokenStream:
    ids: Int64[Tensor, " T"]
    description: str


def _documents(tokenizer: Tokenizer, sources: Sequence[str]) -> list[Document]:
    return [document for source in sources for document in documents(source, tokenizer)]


def _encode(
    tokenizer: Tokenizer, texts: list[Document], sources: Sequence[str], limit: int | None
) -> _TokenStream:
    """Tokenize documents and concatenate them, each with special tokens in front."""
    encoded: list[list[int]] = []
    for templated, run in groupby(texts, lambda document: document.templated):
        # verbose=False: documents longer than the model's context are intended here.
        batch = tokenizer(
            [document.text for document in run],
            add_special_tokens=not templated,
            return_attention_mask=False,
            verbose=False,
        )
        encoded += filter(None, batch["input_ids"])
    if not encoded:
        raise ConfigError(f"{', '.join(sources)}: the tokenizer returns no tokens for this text")
    separator = _separator_ids(tokenizer) if len(encoded) > 1 else []
    special = set(tokenizer.all_special_ids)
    encoded = [ids if ids[0] in special else separator + ids for ids in encoded]
    firsts = {ids[0] for ids in encoded}
    front = tokenizer.decode(list(firsts)) if len(firsts) == 1 and firsts <= special else "nothing"
    ids = torch.tensor(list(chain.from_iterable(encoded)))
    if limit is not None and (largest := int(ids.max())) >= limit:
        raise ConfigError(
            f"{', '.join(sources)}: the tokenizer makes {tokenizer.decode([largest])!r} token "
            f"{largest}, but the model has embeddings for {limit}, 0 to {limit - 1}. Take it out "
            "of the text, or give the model as many embeddings as its tokenizer has tokens."
        )
    return _TokenStream(
        ids,
        f"1 document, tokenised whole, {front} in front"
        if len(encoded) == 1
        else f"{len(encoded)} documents, each tokenised whole, {front} in front of each, joined",
    )


def _separator_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the id of ``<|endoftext|>``, else of BOS, else nothing."""
    known = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return [known[token] for token in (SEPARATOR, tokenizer.bos_token) if token in known][:1]


def _sample_passages(
    texts: list[Document], characters: int, generator: torch.Generator
) -> list[Document]:
    """Return the documents, or random passages of them if they are longer."""
    if sum(len(document.text) for document in texts) <= characters:
        return texts
    passages = [passage for document in texts for passage in _split_passages(document)]
    chosen: list[int] = []
    missing = characters
    for index in torch.randperm(len(passages), generator=generator).tolist():
        if missing <= 0:
            break
        chosen.append(index)
        missing -= len(passages[index].text)
    return [passages[index] for index in sorted(chosen)]


def _split_passages(document: Document) -> Iterator[Document]:
    text, start = document.text, 0
    while start < len(text):
        end = start + PASSAGE_CHARACTERS
        if end < len(text):
            # Split after the last newline, if there is one.
            end = text.rfind("\n", start, end) + 1 or end
        yield Document(text[start:end], document.templated)
        start = end


def _window_starts(total: int, samples: int, length: int, generator: torch.Generator) -> Tensor:
    """Sample window starts on a shifted grid, or overlapping in short texts."""
    slots, rest = divmod(total, length)
    if samples > slots:
        return torch.randperm(total - length + 1, generator=generator)[:samples]
    offset = torch.randint(rest + 1, (), generator=generator)
    return offset + length * torch.randperm(slots, generator=generator)[:samples]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
