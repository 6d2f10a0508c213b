"""Tokens out: windows of token ids to calibrate and to evaluate on.

Documents are tokenised one by one and joined. What a document begins with: the special tokens that
the tokenizer or the chat template puts there; where they put none and there are several documents,
``<|endoftext|>`` if the tokenizer knows it, else its BOS if it has one. So a text that is one
document (WikiText-2 as in the GPTQ, SparseGPT and Wanda papers) stays as its tokenizer makes it.

Shapes: N windows, L tokens in each.
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

# Calibration looks for its windows in no more text than this, or than 16 characters a token of
# them: tokenizers were measured at about 1 MB/s a core.
ENOUGH_CHARACTERS = 4 << 20
PASSAGE_CHARACTERS = 64 << 10


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids, the SHA-256 of their shape and bytes, and in words what they are."""

    ids: Int64[Tensor, "N L"]
    digest: str
    description: str

    @classmethod
    def of(cls, ids: Int64[Tensor, "N L"], description: str) -> "Tokens":
        """Return the windows with their digest."""
        content = str(list(ids.shape)).encode() + ids.numpy().astype("<i8").tobytes()
        return cls(ids, hashlib.sha256(content).hexdigest(), description)


def calibration_tokens(
    tokenizer: Tokenizer, sources: Sequence[str], samples: int, length: int, seed: int
) -> Tokens:
    """Return ``samples`` windows at seeded random places, without overlap if there is text enough.

    With too little text the windows overlap, or are fewer or shorter; the description says so. Of
    more text than is worth tokenising a seeded choice of passages is read.
    """
    generator = torch.Generator().manual_seed(seed)
    found = _documents(tokenizer, sources)
    enough = max(ENOUGH_CHARACTERS, 16 * samples * length)
    chosen = _passages(found, enough, generator)
    stream = _encode(tokenizer, chosen, sources)
    total = len(stream.ids)
    length = min(length, total)
    starts = _starts(total, samples, length, generator)
    notes = [f"seed {seed}"]
    if chosen is not found:
        notes.append(f"from {len(chosen)} passages chosen at random")
    if len(starts) * length > total:
        notes.append("overlapping, for want of text")
    names = ", ".join(map(title, sources))
    return Tokens.of(
        stream.ids.unfold(0, length, 1)[starts].contiguous(),
        f"{_count(len(starts), 'window')} of {_count(length, 'token')} from {names} "
        f"({total:,} tokens), {', '.join(notes)}",
    )


def evaluation_tokens(
    tokenizer: Tokenizer, sources: Sequence[str], length: int, windows: int | None = None
) -> Tokens:
    """Return the text as windows side by side, all of them or the first ``windows``.

    Each document is tokenised whole, as the papers do; what does not fill the last window is
    dropped. A text shorter than one window is one shorter window.
    """
    found = _documents(tokenizer, sources)
    stream = _encode(tokenizer, found, sources)
    wanted, length = length, min(length, len(stream.ids))
    full, rest = divmod(len(stream.ids), length)
    kept = min(full, windows or full)
    counted = _count(full, "non-overlapping window")
    first = f"the first {kept} of " if kept < full else ""
    note = (
        f"the text is shorter than {wanted}" if length < wanted else f"remainder of {rest} dropped"
    )
    return Tokens.of(
        stream.ids[: kept * length].view(kept, length).clone(),
        f"{first}{counted} of {_count(length, 'token')} ({note}) of "
        f"{', '.join(map(title, sources))}: {stream.description}",
    )


@dataclass(frozen=True)
class _Stream:
    ids: Int64[Tensor, " T"]
    description: str


def _documents(tokenizer: Tokenizer, sources: Sequence[str]) -> list[Document]:
    return [document for source in sources for document in documents(source, tokenizer)]


def _encode(tokenizer: Tokenizer, found: list[Document], sources: Sequence[str]) -> _Stream:
    encoded: list[list[int]] = []
    for templated, run in groupby(found, lambda document: document.templated):
        # verbose=False: a document longer than the model's context is meant, not a mistake.
        batch = tokenizer(
            [document.text for document in run],
            add_special_tokens=not templated,
            return_attention_mask=False,
            verbose=False,
        )
        encoded += filter(None, batch["input_ids"])
    if not encoded:
        raise ConfigError(f"{', '.join(sources)}: the tokenizer makes no tokens of this text")
    begin = _begin(tokenizer) if len(encoded) > 1 else []
    marks = set(tokenizer.all_special_ids)
    encoded = [ids if ids[0] in marks else begin + ids for ids in encoded]
    firsts = {ids[0] for ids in encoded}
    front = tokenizer.decode(list(firsts)) if len(firsts) == 1 and firsts <= marks else "nothing"
    return _Stream(
        torch.tensor(list(chain.from_iterable(encoded))),
        f"1 document, tokenised whole, {front} in front"
        if len(encoded) == 1
        else f"{len(encoded)} documents, each tokenised whole, {front} in front of each, joined",
    )


def _begin(tokenizer: Tokenizer) -> list[int]:
    known = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return [known[token] for token in (SEPARATOR, tokenizer.bos_token) if token in known][:1]


def _passages(found: list[Document], enough: int, generator: torch.Generator) -> list[Document]:
    """Return the documents as they are, or a random choice of passages with enough characters."""
    if sum(len(document.text) for document in found) <= enough:
        return found
    passages = [passage for document in found for passage in _cut(document)]
    chosen: list[int] = []
    for index in torch.randperm(len(passages), generator=generator).tolist():
        if enough <= 0:
            break
        chosen.append(index)
        enough -= len(passages[index].text)
    return [passages[index] for index in sorted(chosen)]


def _cut(document: Document) -> Iterator[Document]:
    text, start = document.text, 0
    while start < len(text):
        end = start + PASSAGE_CHARACTERS
        if end < len(text):
            # At the last end of a line, if there is one.
            end = text.rfind("\n", start, end) + 1 or end
        yield Document(text[start:end], document.templated)
        start = end


def _starts(total: int, samples: int, length: int, generator: torch.Generator) -> Tensor:
    slots, rest = divmod(total, length)
    if samples > slots:
        return torch.randperm(total - length + 1, generator=generator)[:samples]
    offset = torch.randint(rest + 1, (), generator=generator)
    return offset + length * torch.randperm(slots, generator=generator)[:samples]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
