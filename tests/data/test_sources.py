"""Documents read from text, JSON, Parquet and hub sources."""

import gzip
import importlib.machinery
import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

from prunekit.data.sources import Document, check_sources, documents, title
from prunekit.errors import ConfigError
from tests.support.checkpoints import templated

WITHOUT_TEMPLATE = SimpleNamespace(chat_template=None)
WITH_TEMPLATE = templated("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def texts(source):
    return [document.text for document in documents(str(source), WITHOUT_TEMPLATE)]


def write(path, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def refuse(source, message, tokenizer=WITHOUT_TEMPLATE):
    with pytest.raises(ConfigError, match=re.escape(message)):
        documents(str(source), tokenizer)


def test_undivided_text_is_one_document_to_the_letter(tmp_path):
    path = write(tmp_path / "a.txt", "\n = Title = \n\nsays <|endoftext|> inside a line\n")
    assert texts(path) == [path.read_text()]


def test_separator_lines_divide_a_text(tmp_path):
    path = write(tmp_path / "a.txt", "one\nstill\n<|endoftext|>\n\n two\n<|endoftext|>\n\n")
    assert texts(path) == ["one\nstill", " two"]


def test_windows_line_ends_and_byte_order_mark_do_not_matter(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n<|endoftext|>\r\ntwo\r\n")
    assert texts(path) == ["one", "two"]


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    refuse(path, f"{path}: not UTF-8")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_rows_are_documents(tmp_path, name):
    path = tmp_path / name
    rows = b'{"text": "caf\xc3\xa9"}\n\n{"text": " "}\n{"text": "b", "messages": 1}\n'
    path.write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)
    assert texts(path) == ["café", "b"]


def test_messages_go_through_the_chat_template(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": CHAT}, {"text": "plain"})
    assert documents(str(path), WITH_TEMPLATE) == [
        Document("<user>hi<assistant>yes", templated=True),
        Document("plain"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": ', "not JSON"),
        ({"prompt": "a"}, 'a row needs the key "text" or "messages"'),
        ('["text"]', 'a row needs the key "text" or "messages"'),
        ({"text": 3}, '"text" must be a string, got int'),
        ({"text": None}, 'a row needs the key "text" or "messages"'),
        ({"messages": "hi"}, '"messages" must be a list of {"role": …, "content": …}'),
        ({"messages": []}, '"messages" must be a list of {"role": …, "content": …}'),
        ({"messages": [{"role": "user"}]}, '"messages" must be a list of {"role": …'),
        ({"messages": CHAT}, '"messages" needs a chat template'),
    ],
)
def test_bad_row_is_refused_with_its_line(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", {"text": "good"}, "", row)
    refuse(path, f"{path}:3: {message}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "a \\ud83d b"}', "character 2 is '\\ud83d', half of a surrogate pair"),
        ("[" * 100_000, "not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_a_row_that_no_tokenizer_takes_is_refused_with_its_line(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", {"text": "good"}, row)
    refuse(path, f"{path}:2: {message}")


def test_null_is_as_good_as_none(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": None, "messages": CHAT, "tools": None})
    other = write(tmp_path / "b.jsonl", {"messages": CHAT})
    assert documents(str(path), WITH_TEMPLATE) == documents(str(other), WITH_TEMPLATE)
    write(path, {"text": "plain", "messages": None})
    assert documents(str(path), WITHOUT_TEMPLATE) == [Document("plain")]


def test_a_conversation_with_half_a_surrogate_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "\udc00"}]})
    refuse(path, f"{path}:1: character 6 is '\\udc00', half of a surrogate", WITH_TEMPLATE)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.txt", "x")
    monkeypatch.setattr("pathlib.Path.read_text", denied)
    refuse(path, f"{path}: cannot be read: Permission denied")


@pytest.mark.parametrize(
    "content", [b"no gzip at all", gzip.compress(b'{"text": "a"}', mtime=0)[:-9]]
)
def test_broken_gzip_is_refused(tmp_path, content):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    refuse(path, f"{path}: not a complete gzip file")


@pytest.mark.parametrize("column", ["text", "messages"])
def test_parquet_rows_are_documents(tmp_path, column):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"text": ["a", "b"], "messages": [CHAT, CHAT]}[column]
    parquet.write_table(pyarrow.table({"id": [1, 2], column: rows}), tmp_path / "a.parquet")
    expected = {"text": ["a", "b"], "messages": ["<user>hi<assistant>yes"] * 2}[column]
    found = documents(str(tmp_path / "a.parquet"), WITH_TEMPLATE)
    assert [document.text for document in found] == expected


def test_parquet_tools_are_handed_on(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    tools = [json.dumps([{"type": "function", "function": {"name": "f"}}]), None]
    table = pyarrow.table({"messages": [CHAT, CHAT], "tools": tools, "other": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    template = "{% if tools %}{{ tools[0].function.name }}|{% endif %}{{ messages[0].content }}"
    found = documents(str(tmp_path / "a.parquet"), templated(template))
    assert [document.text for document in found] == ["f|hi", "hi"]


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    raw = pyarrow.array([b"caf\xe9"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "a.parquet")
    refuse(tmp_path / "a.parquet", "a.parquet: not UTF-8")


def test_parquet_without_text_names_its_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1], "body": ["a"]}), path)
    refuse(path, f'{path}: no column "text" or "messages"; there are: id, body')
    path.write_bytes(path.read_bytes()[:-20])
    refuse(path, f"{path}: not a Parquet file")


def test_pydoc_train_and_test_share_no_paragraph():
    (train,), (test,) = texts("pydoc:train"), texts("pydoc:test")
    parts = [text.split("\n\n") for text in (train, test)]
    assert not set(parts[0]) & set(parts[1])
    assert all(len(part) == len(set(part)) for part in parts)
    assert 0.1 < len(test) / (len(train) + len(test)) < 0.35
    assert "statement" in train
    assert "statement" in test


def test_text_that_is_blank_is_refused(tmp_path):
    refuse(write(tmp_path / "a.txt", " \n<|endoftext|>\n"), "contains no text")
    refuse(write(tmp_path / "a.jsonl", {"text": " "}), "contains no text")


def test_all_problems_show_without_reading(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "good.txt").write_bytes(b"\xff is not read")
    sources = ["folder", "empty.txt", "a.csv", "none.txt", "good.txt", "pydoc:all", "hub:x"]
    assert check_sources([*sources, "pydoc:test"]) == [
        "folder: is a folder; name the files in it",
        "empty.txt: the file is empty",
        "a.csv: not a supported kind of text. Allowed: .txt, .jsonl, .jsonl.gz, .parquet, "
        "pydoc:train, pydoc:test, hub:NAME:SPLIT",
        "none.txt: no such file",
        "pydoc:all: choose pydoc:train or pydoc:test",
        "hub:x: write hub:NAME[/CONFIG]:SPLIT[:COLUMN]",
    ]


def test_missing_extras_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = write(tmp_path / "a.parquet", "x")
    assert check_sources([str(path), "hub:a/b:train"]) == [
        f"{path}: needs the package pyarrow: pip install 'prunekit[parquet]'",
        "hub:a/b:train: needs the package datasets: pip install 'prunekit[hub]'",
    ]


class Rows(list):
    column_names = ("text", "body")


class Broken(Rows):
    def __iter__(self):
        yield {"text": "a"}
        raise ImportError("To support decoding images, please install Pillow")


@pytest.fixture
def hub(monkeypatch):
    """A fake ``datasets`` package that records the arguments of each call."""
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if split == "none":
            raise ValueError("Unknown split")
        if split == "script":
            raise RuntimeError("Dataset scripts are no longer supported, but found c4.py")
        if split == "broken":
            return Broken()
        return Rows([{"text": "a", "body": "A"}, {"text": "", "body": "B"}])

    module = ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_hub_entries_say_name_config_split_and_column(hub):
    assert texts("hub:imdb:train") == ["a"]
    assert texts("hub:me/data:train[:10%]:body") == ["A", "B"]
    assert texts("hub:Salesforce/wikitext/wikitext-2-raw-v1:test:body") == ["A", "B"]
    assert hub == [
        ("imdb", None, "train"),
        ("me/data", None, "train[:10%]"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    ]


def test_hub_mistakes_are_told(hub):
    refuse("hub:imdb:none", "hub:imdb:none: cannot be loaded: Unknown split")
    script = "hub:acme/c4/en:script: cannot be loaded: Dataset scripts are no longer supported, "
    refuse("hub:acme/c4/en:script", f"{script}but found c4.py. Code that comes with a data set is")
    refuse("hub:imdb:broken", "hub:imdb:broken: its rows cannot be read: To support decoding")
    refuse("hub:imdb:test:title", 'hub:imdb:test:title: no column "title"; there are: text, body')


def test_title_is_the_same_on_every_machine():
    assert title("/home/me/data/wikitext2/test.txt") == "wikitext2/test.txt"
    assert title("test.txt") == "test.txt"
    assert title("hub:me/data:test") == "hub:me/data:test"
    assert re.fullmatch(r"pydoc:test \(of Python 3\.\d+\.\d+\S*\)", title("pydoc:test"))
