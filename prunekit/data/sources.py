"""Calibration and evaluation text sources: the entries of ``data = [...]``.

entry                                documents
``a.txt``                            the file, split at lines ``<|endoftext|>`` if there are any
``a.jsonl``, ``a.jsonl.gz``          one per row: key ``text``, or ``messages`` and ``tools``;
                                     with the key ``image`` or ``audio`` see
                                     :mod:`prunekit.data.images`, :mod:`prunekit.data.sounds`
``a.parquet``                        one per row: columns as these keys
``pydoc:train``, ``pydoc:test``      one: the language reference that ships with Python
``hub:NAME[/CONFIG]:SPLIT[:COLUMN]`` one per row: COLUMN, or as above; NAME is ``owner/name``

A ``.txt`` without separator lines is used unchanged; otherwise newlines around each document are
stripped. Blank documents are dropped. ``messages`` are written as text by the chat template.
"""

import hashlib
import importlib.util
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.data.chat import ChatTemplate
from prunekit.data.rows import HUB, given, hub_rows, json_rows, parquet_rows, valid_text
from prunekit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

SELF = "self"
"""Entry for text that the dense model generates."""
SEPARATOR = "<|endoftext|>"
JSON_LINES = (".jsonl", ".jsonl.gz")
ENDINGS = (".txt", *JSON_LINES, ".parquet")
PYDOC = ("pydoc:train", "pydoc:test")
TASK_FILES = (".yaml", ".yml")
"""Ends of the names of files that define tasks of lm-eval."""


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        text: The text.
        templated: A chat template has added the special tokens already.
    """

    text: str
    templated: bool = False


def check_sources(sources: Sequence[str]) -> list[str]:
    """Return an error message per invalid source, without reading the texts."""
    return [problem for source in sources if (problem := _source_problem(source))]


def documents(source: str, tokenizer: Tokenizer) -> list[Document]:
    """Read the documents of one source; ``messages`` use the tokenizer's chat template.

    Raises:
        ConfigError: The source is invalid, cannot be read, has no text, or is not in its format.
    """
    if problem := _source_problem(source):
        raise ConfigError(problem)
    try:
        texts = [document for document in _documents(source, tokenizer) if document.text.strip()]
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror or error}") from error
    if not texts:
        raise ConfigError(f"{source}: contains no text")
    return texts


def title(source: str) -> str:
    """Return the name of a source in descriptions, independent of the machine."""
    if source.startswith("pydoc:"):
        return f"{source} (of Python {platform.python_version()})"
    return source if source.startswith("hub:") else "/".join(Path(source).parts[-2:])


def _source_problem(source: str) -> str | None:
    if source.startswith("pydoc:"):
        return None if source in PYDOC else f"{source}: choose {' or '.join(PYDOC)}"
    if source.startswith("hub:"):
        if not HUB.fullmatch(source):
            return f"{source}: write hub:NAME[/CONFIG]:SPLIT[:COLUMN]"
        return missing_package(source, "datasets", "hub")
    return file_problem(source, ENDINGS, (*PYDOC, "hub:NAME:SPLIT"))


def file_problem(source: str, endings: Sequence[str], others: Sequence[str]) -> str | None:
    """Return why a file is no source, or None.

    Args:
        source: Path of the file.
        endings: Allowed ends of its name.
        others: Further allowed sources, for the message.
    """
    path = Path(source)
    # Unlike the methods of Path, these do not raise on invalid file names.
    if os.path.isdir(path):  # noqa: PTH112
        return f"{source}: is a folder; name the files in it"
    if not source.endswith(tuple(endings)):
        allowed = ", ".join((*endings, *others))
        return f"{source}: not a supported kind of text. Allowed: {allowed}"
    if not os.path.isfile(path):  # noqa: PTH113
        return f"{source}: no such file"
    if path.stat().st_size == 0:
        return f"{source}: the file is empty"
    return missing_package(source, "pyarrow", "parquet") if source.endswith(".parquet") else None


def missing_package(source: str, package: str, extra: str) -> str | None:
    """Return how to install a package that a source needs, or None."""
    if importlib.util.find_spec(package):
        return None
    return f"{source}: needs the package {package}: pip install 'prunekit[{extra}]'"


def _documents(source: str, tokenizer: Tokenizer) -> Iterable[Document]:
    if source.startswith("pydoc:"):
        return [Document(_pydoc(source))]
    if source.endswith(".txt"):
        return map(Document, _text_documents(source))
    if source.startswith("hub:"):
        rows = hub_rows(source)
    elif source.endswith(".parquet"):
        rows = parquet_rows(source, partial(_text_columns, source))
    else:
        rows = map(_text_alone, json_rows(source))
    template = ChatTemplate(tokenizer)
    return (_document(row, where, template) for where, row in rows)


def _text_alone(located: tuple[str, Any]) -> tuple[str, Any]:
    """Return a row; refuse one whose image or sound would be ignored."""
    where, row = located
    for key in ("image", "audio"):
        if isinstance(row, dict) and row.get(key) is not None:
            raise ConfigError(
                f'{where}: has the key "{key}", which is read for calibration alone, from files '
                "whose first row has it"
            )
    return where, row


def _pydoc(source: str) -> str:
    """Return the test topics (a fifth of the text) or the others.

    Topics repeat each other at length, so each paragraph is used once only; paragraphs of the test
    topics are removed from the training text.
    """
    from pydoc_data.topics import topics

    # The remainder whose topics come closest to a fifth of the text (Python 3.11: 21 %).
    held_out = {name for name in topics if hashlib.sha256(name.encode()).digest()[0] % 5 == 4}
    test = _unique_paragraphs(topics[name] for name in sorted(held_out))
    train = _unique_paragraphs(topics[name] for name in sorted(topics.keys() - held_out))
    chosen = test if source == "pydoc:test" else [part for part in train if part not in test]
    return "\n\n".join(chosen)


def _unique_paragraphs(texts: Iterable[str]) -> dict[str, None]:
    return dict.fromkeys(
        paragraph.strip("\n") for text in texts for paragraph in text.split("\n\n")
    )


def _text_documents(source: str) -> list[str]:
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8: {error}") from error
    parts = re.split(rf"^{re.escape(SEPARATOR)}$", text, flags=re.MULTILINE)
    return parts if len(parts) == 1 else [part.strip("\n") for part in parts]


def _text_columns(source: str, present: Sequence[str]) -> list[str]:
    """Return the columns of documents."""
    columns = [name for name in ("text", "messages") if name in present][:1]
    if not columns:
        found = ", ".join(present)
        raise ConfigError(f'{source}: no column "text" or "messages"; there are: {found}')
    return [*columns, "tools"] if columns == ["messages"] and "tools" in present else columns


def _document(row: Any, where: str, template: ChatTemplate) -> Document:  # noqa: ANN401  as parsed
    row = given(row)
    if "text" not in row and "messages" not in row:
        raise ConfigError(f'{where}: a row needs the key "text" or "messages"')
    if "text" not in row:
        return Document(valid_text(template.text(row, where), where), templated=True)
    if not isinstance(row["text"], str):
        raise ConfigError(f'{where}: "text" must be a string, got {type(row["text"]).__name__}')
    return Document(valid_text(row["text"], where))
