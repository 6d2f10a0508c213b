"""Labelled samples: sentences with a class, inputs with a target.

task               columns, and the names that each may have by default
``classification`` ``text`` (or ``sentence``), ``label``; ``pair``, if there is one
``seq2seq``        ``input``, ``target``

Sources are .tsv, .csv, .jsonl, .jsonl.gz, .parquet and ``hub:NAME[/CONFIG]:SPLIT``. A label is the
number of a class or its name in ``id2label`` of the model's ``config.json``. Each row is one
sample, with the special tokens that the tokenizer adds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from prunekit.data.rows import HUB, hub_rows, json_rows, parquet_rows, table_rows, valid_text
from prunekit.data.sources import file_problem, missing_package
from prunekit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Task = Literal["classification", "seq2seq"]
TABLES = (".tsv", ".csv")
ENDINGS = (*TABLES, ".jsonl", ".jsonl.gz", ".parquet")
COLUMNS: dict[Task, dict[str, tuple[str, ...]]] = {
    "classification": {"text": ("text", "sentence"), "pair": ("pair",), "label": ("label",)},
    "seq2seq": {"input": ("input",), "target": ("target",)},
}
"""Columns of each task, with their default names."""
OPTIONAL = frozenset({"pair"})
CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True)
class Example:
    """A labelled row, before it is tokenized.

    Attributes:
        where: File and line, for messages.
        text: The text; that of the input.
        pair: A second text; None without one.
        target: Number of the class, or the text of the target.
    """

    where: str
    text: str
    pair: str | None
    target: int | str


def check_labelled_sources(sources: Sequence[str]) -> list[str]:
    """Return an error message per invalid source, without reading the rows."""
    return [problem for source in sources if (problem := _source_problem(source))]


def _source_problem(source: str) -> str | None:
    if not source.startswith("hub:"):
        return file_problem(source, ENDINGS, ["hub:NAME:SPLIT"])
    parts = HUB.fullmatch(source)
    if not parts or parts["column"]:
        return f"{source}: write hub:NAME[/CONFIG]:SPLIT, and name columns by columns = {{…}}"
    return missing_package(source, "datasets", "hub")


@dataclass(frozen=True)
class LabelledTask:
    """A task on labelled rows, as one model reads them.

    Attributes:
        name: The task.
        columns: Names of columns that differ from the default ones, by column.
        classes: Name of each class; empty for other tasks.
        pad: Token id that fills shorter samples of a batch.
        vocabulary: Number of token ids that the model knows.
        has_token_types: The model tells the two texts of a pair apart by token types.
    """

    name: Task
    columns: Mapping[str, str]
    classes: Sequence[str]
    pad: int
    vocabulary: int
    has_token_types: bool

    @classmethod
    def of(cls, name: Task, columns: Mapping[str, str] | None, model: "PreTrainedModel") -> Self:
        """Return the task for a model, with or without weights.

        Args:
            name: The task.
            columns: Names of columns, by column.
            model: The model that reads the samples.

        Raises:
            ConfigError: The model is of another kind, or a column is unknown.
        """
        config: Any = model.config
        if problem := _why_unfit(name, model):
            raise ConfigError(f'task: "{name}" {problem}')
        for column in columns or {}:
            if column not in COLUMNS[name]:
                raise ConfigError(
                    f"columns: {column!r} is none of task {name!r}, which has "
                    f"{', '.join(COLUMNS[name])}."
                )
        names = config.id2label if name == "classification" else {}
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
        return cls(
            name,
            dict(columns or {}),
            [str(names[number]) for number in sorted(names)],
            pad=config.get_text_config().pad_token_id or 0,
            vocabulary=min(each.weight.shape[0] for each in embeddings if each),  # pyright: ignore
            has_token_types=getattr(config, "type_vocab_size", 0) > 1,
        )

    def examples(self, sources: Sequence[str]) -> list[Example]:
        """Read all rows of the sources.

        Raises:
            ConfigError: A source cannot be read or has no rows, a column is missing, or a value is
                not of its kind.
        """
        return [example for source in sources for example in self._of_source(source)]

    def _of_source(self, source: str) -> list[Example]:
        if problems := check_labelled_sources([source]):
            raise ConfigError(problems[0])
        try:
            found = [self._example(where, row) for where, row in self._rows(source)]
        except OSError as error:
            raise ConfigError(f"{source}: cannot be read: {error.strerror or error}") from error
        if not found:
            raise ConfigError(f"{source}: has no rows")
        return found

    def _rows(self, source: str) -> Iterator[tuple[str, Any]]:
        choose = partial(self._choose, source)
        if source.endswith(TABLES):
            return table_rows(source, choose)
        if source.startswith("hub:"):
            return hub_rows(source)
        return parquet_rows(source, choose) if source.endswith(".parquet") else json_rows(source)

    def _choose(self, where: str, present: Sequence[str]) -> list[str]:
        """Return the columns to read, in the order of the task."""
        return [*self._named(where, present).values()]

    def _named(self, where: str, present: Sequence[str]) -> dict[str, str]:
        """Return the name of each column that a source has.

        Raises:
            ConfigError: One is missing, or its name occurs twice.
        """
        found = {}
        for column, usual in COLUMNS[self.name].items():
            names = (self.columns[column],) if column in self.columns else usual
            name = next((name for name in names if name in present), None)
            if name is not None:
                found[column] = name
            elif column in self.columns or column not in OPTIONAL:
                there = ", ".join(present) or "none"
                raise ConfigError(
                    f"{where}: no column {' or '.join(map(repr, names))}; there are: {there}. Name "
                    f"the column of each {column} by columns = {{{column} = …}}"
                )
            if name is not None and present.count(name) > 1:
                raise ConfigError(f"{where}: two columns have the name {name!r}")
        return found

    def _example(self, where: str, row: Any) -> Example:  # noqa: ANN401  as parsed
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: a row is a table of columns, not {type(row).__name__}")
        names = self._named(where, [*row])
        texts = {
            column: _text(row[name], f"{where}: {name}")
            for column, name in names.items()
            if column != "label"
        }
        if self.name == "seq2seq":
            return Example(where, texts["input"], None, texts["target"])
        label = self._label(row[names["label"]], f"{where}: {names['label']}")
        return Example(where, texts["text"], texts.get("pair"), label)

    def _label(self, value: object, where: str) -> int:
        """Return the number of a class."""
        number = value
        if isinstance(value, str):
            if value in self.classes:
                return self.classes.index(value)
            number = int(value) if value.isascii() and value.isdigit() else None
        if type(number) is int and 0 <= number < len(self.classes):
            return number
        known = ", ".join(f"{at} ({name})" for at, name in enumerate(self.classes[:SHOWN]))
        more = ", …" if len(self.classes) > SHOWN else ""
        raise ConfigError(f"{where}: {value!r} is no class. The model knows: {known}{more}")


SHOWN = 10
"""Classes that a message lists."""


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: must be a string, got {type(value).__name__}")
    return valid_text(value, where)


def _why_unfit(name: Task, model: "PreTrainedModel") -> str | None:
    """Return why a model cannot do a task, or None."""
    kind, config = type(model).__name__, model.config
    if name == "seq2seq":
        predicts = config.is_encoder_decoder and model.get_output_embeddings() is not None
        return None if predicts else f"needs an encoder-decoder that writes text, not {kind}."
    if not kind.endswith(CLASSIFIER):
        return f"needs a model …{CLASSIFIER}, not {kind}."
    labels, problem = config.num_labels or 0, getattr(config, "problem_type", None)
    if labels < 2 or problem == "regression":
        return f"needs two classes or more, and {kind} with num_labels {labels} is for regression."
    if problem == "multi_label_classification":
        return f"has one class a sample, and {kind} finds several: problem_type is {problem!r}."
    if config.get_text_config().pad_token_id is None:
        return f"needs pad_token_id in config.json, by which {kind} tells padding from text."
    return None
