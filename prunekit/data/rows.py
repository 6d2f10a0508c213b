"""Rows of tables, JSON lines, Parquet files and hub data.

Each row comes with its place, for messages: file and line, or source and number.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prunekit.errors import ConfigError, is_out_of_memory

Choose = Callable[[Sequence[str]], list[str]]
"""Returns the columns to read of those that are there; raises where one is missing."""
SCRIPT_HINT = (
    "Code that comes with a data set is never run: name one that is stored as files, or save its "
    "rows as .jsonl or .parquet"
)
HUB = re.compile(
    r"hub:(?P<name>[^/:]+(/[^/:]+)?)(/(?P<config>[^/:]+))?"
    r":(?P<split>[^:\[]+(\[[^\]]*\])?)(:(?P<column>.+))?"
)


def json_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of a file with one JSON value per line.

    Raises:
        ConfigError: The file is not UTF-8, not JSON, or a damaged gzip file.
    """
    opener = gzip.open if source.endswith(".gz") else open
    where = source
    try:
        with opener(source, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{source}:{number}"
                if line.strip():
                    yield where, json.loads(line)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{source}: not a complete gzip file: {error}") from error


def parquet_rows(source: str, choose: Choose) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a Parquet file, by column.

    Raises:
        ConfigError: The file is no Parquet file, or ``choose`` refuses its columns.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(source) as file:
            columns = choose(file.schema_arrow.names)
            batches = file.iter_batches(columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{source}: row {number}", row) for number, row in enumerate(rows, 1))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8: {error}") from error
    except MemoryError:  # that of pyarrow is an ArrowException too
        raise
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{source}: not a Parquet file: {error}") from error


def hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a data set of the hub.

    Raises:
        ConfigError: The data set cannot be loaded, or lacks the column.
    """
    import datasets  # pyright: ignore[reportMissingImports]  an extra

    parts = HUB.fullmatch(source)
    assert parts is not None, "checked by _source_problem"
    try:
        rows = datasets.load_dataset(parts["name"], parts["config"], split=parts["split"])
    except Exception as error:  # RuntimeError for a script, and errors of many libraries
        if is_out_of_memory(error):
            raise
        hint = f". {SCRIPT_HINT}" if "script" in str(error).lower() else ""
        raise ConfigError(f"{source}: cannot be loaded: {error}{hint}") from error
    column = parts["column"]
    if column and column not in rows.column_names:
        found = ", ".join(rows.column_names)
        raise ConfigError(f'{source}: no column "{column}"; there are: {found}')
    try:
        for number, row in enumerate(rows, 1):
            yield f"{source}: row {number}", {"text": row[column]} if column else row
    except ConfigError:
        raise
    except Exception as error:  # rows are decoded here
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"{source}: its rows cannot be read: {error}") from error


def table_rows(source: str, choose: Choose) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a .csv or .tsv file.

    Cells of a .csv may be quoted; in a .tsv a quote is a character like any other.

    Args:
        source: Path of the file.
        choose: Called with the names of the columns.

    Raises:
        ConfigError: The file is no such table, or a row has another number of cells.
    """
    tabs = source.endswith(".tsv")
    form: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    line = 0
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:  # noqa: PTH123
            rows = csv.reader(file, **form)
            head = next(rows, [])
            line = rows.line_num
            wanted = choose(head)
            for cells in rows:
                first, line = line + 1, rows.line_num
                if not cells:
                    continue
                if len(cells) != len(head):
                    raise ConfigError(
                        f"{source}:{first}: {len(cells)} cells, and the first line names "
                        f"{len(head)} columns"
                    )
                found = dict(zip(head, cells, strict=True))
                yield f"{source}:{first}", {name: found[name] for name in wanted}
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8: {error}") from error
    except csv.Error as error:
        kind = "tsv" if tabs else "csv"
        raise ConfigError(f"{source}:{line + 1}: not a row of a .{kind} file: {error}") from error


def given(row: Any) -> dict[str, Any]:  # noqa: ANN401  as parsed
    """Return the entries of a row that are not null.

    A table has null where only other rows have a value.
    """
    items = row.items() if isinstance(row, dict) else ()
    return {key: value for key, value in items if value is not None}


def valid_text(text: str, where: str) -> str:
    """Refuse half a surrogate pair, which no tokenizer accepts.

    JSON can hold one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: character {error.start} is {text[error.start]!a}, half of a surrogate "
            "pair, which is no character. Write the text as UTF-8"
        ) from error
    return text
