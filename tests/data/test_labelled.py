"""Labelled rows: columns, classes, and the models that can do a task."""

import gzip
import json
import re

import pytest
from transformers import AutoModel

from prunekit.data.labelled import LabelledTask, check_labelled_sources
from prunekit.errors import ConfigError
from tests.support.architectures import tiny
from tests.support.labelled import classifier, write_rows


@pytest.fixture(scope="module")
def model():
    return classifier(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})


def read(model, file, columns=None, task="classification"):
    examples = LabelledTask.of(task, columns, model).examples([str(file)])
    return [(each.text, each.pair, each.target) for each in examples]


def test_a_label_is_a_number_or_a_name(model, tmp_path):
    file = write_rows(tmp_path / "a.csv", ("text", "label"), ("a", "yes"), ("b", "0"), ("", "1"))
    assert read(model, file) == [("a", None, 1), ("b", None, 0), ("", None, 1)]


def test_a_name_that_is_a_number_is_the_name(tmp_path):
    stars = classifier(id2label={0: "1", 1: "2"}, label2id={"1": 0, "2": 1})
    file = write_rows(tmp_path / "a.tsv", ("text", "label"), ("a", "1"), ("b", "2"))
    assert [target for *_, target in read(stars, file)] == [0, 1]


def test_every_format_has_the_same_rows(model, tmp_path):
    lines = [{"sentence": "a", "pair": "b", "label": 1, "x": 0}, {"sentence": "c", "label": "no"}]
    expected = [("a", "b", 1), ("c", None, 0)]
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    text = "\n".join(map(json.dumps, lines))
    plain.write_text(text)
    with gzip.open(packed, "wt") as file:
        file.write(text)
    assert read(model, plain) == read(model, packed) == expected


def test_parquet_rows_are_read(model, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"s": ["a", "b"], "gold": [1, 0], "other": [[1], [2]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    columns = {"text": "s", "label": "gold"}
    assert read(model, tmp_path / "a.parquet", columns) == [("a", None, 1), ("b", None, 0)]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("sentence", "gold"), ("a", 1)], None, "no column 'label'; there are: sentence, gold"),
        ([("x", "label"), ("a", 1)], None, "no column 'text' or 'sentence'; there are: x, label"),
        ([("text", "label"), ("a", 1)], {"pair": "b"}, "no column 'b'; there are: text, label"),
        ([("text", "text", "label"), ("a", "b", 1)], None, "two columns have the name 'text'"),
        (
            [("text", "label"), ("a", 2)],
            None,
            ":2: label: '2' is no class. The model knows: 0 (no)",
        ),
        ([("text", "label"), ("a", "-1")], None, ":2: label: '-1' is no class"),
        ([("text", "label"), ("a", "maybe")], None, "'maybe' is no class"),
        ([("text", "label")], None, "has no rows"),
    ],
)
def test_rows_that_do_not_fit_are_refused(model, tmp_path, rows, columns, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read(model, write_rows(tmp_path / "a.tsv", *rows), columns)
    assert str(caught.value).startswith(str(tmp_path / "a.tsv"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 1, "label": 1}, "text: must be a string, got int"),
        ({"text": "a", "label": 1.0}, "1.0 is no class"),
        ({"text": "a", "label": True}, "True is no class"),
        ({"text": "a"}, "no column 'label'; there are: text"),
        ({"text": "\ud800", "label": 1}, "half of a surrogate pair"),
        ([1], "a row is a table of columns, not list"),
    ],
)
def test_values_of_another_kind_are_refused(model, tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'a.jsonl'}:1: ")) as caught:
        read(model, tmp_path / "a.jsonl")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("made", "task", "message"),
    [
        (lambda: tiny("llama"), "classification", "needs a model …ForSequenceClassification, not"),
        (lambda: tiny("bert"), "seq2seq", "needs an encoder-decoder that writes text, not BertFor"),
        (lambda: tiny("t5", AutoModel), "seq2seq", "that writes text, not T5Model"),
        (lambda: classifier(num_labels=1), "classification", "with num_labels 1 is for regression"),
        (lambda: classifier(problem_type="regression"), "classification", "is for regression"),
        (
            lambda: classifier(problem_type="multi_label_classification"),
            "classification",
            "has one class a sample",
        ),
        (lambda: classifier("llama", pad_token_id=None), "classification", "needs pad_token_id"),
    ],
)
def test_a_task_that_does_not_fit_the_model_is_refused(made, task, message):
    with pytest.raises(ConfigError, match=f'^task: "{task}" .*{re.escape(message)}'):
        LabelledTask.of(task, None, made())


def test_sources_are_checked_without_reading(tmp_path):
    (tmp_path / "empty.tsv").touch()
    said = check_labelled_sources(
        [str(tmp_path / "empty.tsv"), str(tmp_path / "b.csv"), "pydoc:train", "hub:a/b:train:text"]
    )
    assert [line.rpartition(": ")[2].split(",")[0] for line in said] == [
        "the file is empty", "no such file", ".tsv", "write hub:NAME[/CONFIG]:SPLIT",
    ]  # fmt: skip
