"""Text in: what an entry of ``data = [...]`` may be, and the documents it holds.

entry                                documents
``a.txt``                            the file; several if lines ``<|endoftext|>`` divide it
``a.jsonl``, ``a.jsonl.gz``          one a row: key ``text``, or ``messages`` (chat template)
``a.parquet``                        one a row: column ``text``, or ``messages`` (chat template)
``pydoc:train``, ``pydoc:test``      one: the language reference that every Python carries
``hub:NAME[/CONFIG]:SPLIT[:COLUMN]`` one a row, COLUMN or as above; NAME is ``owner/name``

An undivided ``.txt`` is taken to the letter; documents of a divided one lose the newlines around
them. Blank documents are dropped.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import platform
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

SELF = "self"
"""Not a text that is there: the dense model writes it."""
SEPARATOR = "<|endoftext|>"
ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
PYDOC = ("pydoc:train", "pydoc:test")
HUB = re.compile(
    r"hub:(?P<name>[^/:]+(/[^/:]+)?)(/(?P<config>[^/:]+))?"
    r":(?P<split>[^:\[]+(\[[^\]]*\])?)(:(?P<column>.+))?"
)


@dataclass(frozen=True)
class Document:
    """One text; ``templated`` if a chat template has already put the special tokens into it."""

    text: str
    templated: bool = False


def check_sources(sources: Sequence[str]) -> list[str]:
    """Return what is wrong with the sources as far as that shows without reading them."""
    return [problem for source in sources if (problem := _problem(source))]


def documents(source: str, tokenizer: Tokenizer) -> list[Document]:
    """Read the documents of one source; the tokenizer lends its chat template.

    Raises:
        ConfigError: There is no text in the source, or something that is not text.
    """
    if problem := _problem(source):
        raise ConfigError(problem)
    found = [document for document in _documents(source, tokenizer) if document.text.strip()]
    if not found:
        raise ConfigError(f"{source}: there is no text in it")
    return found


def title(source: str) -> str:
    """Return how a description calls the source: the same on every machine that has it."""
    if source.startswith("pydoc:"):
        return f"{source} (of Python {platform.python_version()})"
    return source if source.startswith("hub:") else "/".join(Path(source).parts[-2:])


def _problem(source: str) -> str | None:
    if source.startswith("pydoc:"):
        return None if source in PYDOC else f"{source}: choose {' or '.join(PYDOC)}"
    if source.startswith("hub:"):
        if not HUB.fullmatch(source):
            return f"{source}: write hub:NAME[/CONFIG]:SPLIT[:COLUMN]"
        return _missing(source, "datasets", "hub")
    return _file_problem(source)


def _file_problem(source: str) -> str | None:
    path = Path(source)
    # Unlike Path's, these answer also for what no file can be called.
    if os.path.isdir(path):  # noqa: PTH112
        return f"{source}: is a folder; name the files in it"
    if not source.endswith(ENDINGS):
        allowed = ", ".join((*ENDINGS, *PYDOC, "hub:NAME:SPLIT"))
        return f"{source}: not a kind of text that can be read. Allowed: {allowed}"
    if not os.path.isfile(path):  # noqa: PTH113
        return f"{source}: no such file"
    if path.stat().st_size == 0:
        return f"{source}: the file is empty"
    return _missing(source, "pyarrow", "parquet") if source.endswith(".parquet") else None


def _missing(source: str, package: str, extra: str) -> str | None:
    if importlib.util.find_spec(package):
        return None
    return f"{source}: needs the package {package}: pip install 'prunekit[{extra}]'"


def _documents(source: str, tokenizer: Tokenizer) -> Iterable[Document]:
    if source.startswith("pydoc:"):
        return [Document(_pydoc(source))]
    if source.endswith(".txt"):
        return map(Document, _texts(source))
    if source.startswith("hub:"):
        rows = _hub_rows(source)
    elif source.endswith(".parquet"):
        rows = _parquet_rows(source)
    else:
        rows = _json_rows(source)
    return (_document(row, where, tokenizer) for where, row in rows)


def _pydoc(source: str) -> str:
    """Return the test topics, about a fifth of the text, or all else.

    Topics quote each other at length: each paragraph is said once, in test if it is there at all.
    """
    from pydoc_data.topics import topics

    # Of the five remainders the one that comes nearest to a fifth of the text (3.11: 21 %).
    tested = {name for name in topics if hashlib.sha256(name.encode()).digest()[0] % 5 == 4}
    test = _unique_paragraphs(topics[name] for name in sorted(tested))
    train = _unique_paragraphs(topics[name] for name in sorted(topics.keys() - tested))
    chosen = test if source == "pydoc:test" else [part for part in train if part not in test]
    return "\n\n".join(chosen)


def _unique_paragraphs(texts: Iterable[str]) -> dict[str, None]:
    return dict.fromkeys(
        paragraph.strip("\n") for text in texts for paragraph in text.split("\n\n")
    )


def _texts(source: str) -> list[str]:
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8: {error}") from error
    parts = re.split(rf"^{re.escape(SEPARATOR)}$", text, flags=re.MULTILINE)
    return parts if len(parts) == 1 else [part.strip("\n") for part in parts]


def _json_rows(source: str) -> Iterator[tuple[str, Any]]:
    opener = gzip.open if source.endswith(".gz") else open
    where = source
    try:
        with opener(source, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{source}:{number}"
                if line.strip():
                    yield where, json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8: {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{source}: not a whole gzip file: {error}") from error


def _parquet_rows(source: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(source) as file:
            present = file.schema_arrow.names
            columns = [name for name in ("text", "messages") if name in present][:1]
            if not columns:
                found = ", ".join(present)
                raise ConfigError(f'{source}: no column "text" or "messages"; there are: {found}')
            batches = file.iter_batches(columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{source}: row {number}", row) for number, row in enumerate(rows, 1))
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{source}: not a Parquet file: {error}") from error


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    import datasets  # pyright: ignore[reportMissingImports]  an extra

    parts = HUB.fullmatch(source)
    assert parts is not None, "checked before anything is read"
    try:
        rows = datasets.load_dataset(parts["name"], parts["config"], split=parts["split"])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error
    column = parts["column"]
    if column and column not in rows.column_names:
        found = ", ".join(rows.column_names)
        raise ConfigError(f'{source}: no column "{column}"; there are: {found}')
    for number, row in enumerate(rows, 1):
        yield f"{source}: row {number}", {"text": row[column]} if column else row


def _document(row: Any, where: str, tokenizer: Tokenizer) -> Document:  # noqa: ANN401  as parsed
    if not isinstance(row, dict) or ("text" not in row and "messages" not in row):
        raise ConfigError(f'{where}: a row needs the key "text" or "messages"')
    if "text" not in row:
        return Document(_conversation(row["messages"], where, tokenizer), templated=True)
    if not isinstance(row["text"], str):
        raise ConfigError(f'{where}: "text" must be a string, got {type(row["text"]).__name__}')
    return Document(row["text"])


def _conversation(messages: Any, where: str, tokenizer: Tokenizer) -> str:  # noqa: ANN401  as parsed
    from jinja2 import TemplateError

    said = isinstance(messages, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages
    )
    if not (said and messages):
        raise ConfigError(f'{where}: "messages" must be a list of {{"role": …, "content": …}}')
    if not tokenizer.chat_template:
        raise ConfigError(
            f'{where}: "messages" needs a chat template, which this model\'s tokenizer lacks; '
            'give rows with "text"'
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError) as error:
        raise ConfigError(f"{where}: the chat template refuses this: {error}") from error
