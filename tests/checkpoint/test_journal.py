"""Journal: entries are whole or dropped, and beginning is atomic."""

import errno
import fcntl
import json
import os

import pytest

from prunekit.checkpoint.journal import JOURNAL, START, Journal, is_journal, read_journal
from prunekit.errors import CheckpointError, ConfigError


@pytest.fixture
def journal(tmp_path):
    made = Journal(tmp_path)
    made.start({"fingerprint": "f"})
    made.append(
        "block", "0", {"loss": float("nan"), "many": [1.5e-300, 1 / 3, "ü"], "to": {"1": 2}}
    )
    made.append("block", "1", {})
    yield made
    made.close()


def test_entries_are_read_as_they_were_written(journal):
    found = read_journal(journal.path)
    assert [*found] == [START, ("block", "0"), ("block", "1")]
    assert found["block", "0"]["many"] == [1.5e-300, 1 / 3, "ü"]


DAMAGES = {
    "another number": lambda line: line.replace(b"1.5e-300", b"2.5e-300"),
    "a list": lambda line: b"[1]\n",
    "a number": lambda line: b"1\n",
    "null": lambda line: b"null\n",
    "no values": lambda line: b'{"kind": "block", "name": "0"}\n',
    "a list of values": lambda line: b'{"kind": "block", "name": "0", "values": [], "crc32": 1}\n',
    "a number as name": lambda line: b'{"kind": "block", "name": 0, "values": {}, "crc32": 1}\n',
    "a list as kind": lambda line: b'{"kind": [], "name": "0", "values": {}, "crc32": 1}\n',
    "no checksum": lambda line: json.dumps({**json.loads(line), "crc32": None}).encode() + b"\n",
    "deep": lambda line: b"[" * 100_000 + b"\n",
    "no line feed": lambda line: line[:-1],
    "bytes": lambda line: b"\xff\xfe\n",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_line_that_is_no_entry_ends_the_journal(journal, damage):
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(lines[0] + damage(lines[1]) + lines[2])
    assert [*read_journal(journal.path)] == [START]
    journal.path.write_bytes(damage(lines[0].replace(b'"f"', b'"1.5e-300"')) + lines[1])
    assert read_journal(journal.path) == {}
    assert not is_journal(journal.path)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_journal_begins_with_its_start(journal, missing):
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(b"".join(lines[1 - missing : 2 - missing]))
    assert is_journal(journal.path) == bool(missing)


@pytest.mark.parametrize(
    ("content", "ours"),
    [
        (b"", True),
        (b'{"kind": "sta', True),
        (b'{"kind": "start", "name": "", "val', True),
        (b'{"mine": 1}\n', False),
        (b"\n", False),
        (b"\0\0", False),
    ],
)
def test_what_may_be_the_beginning_of_a_journal(tmp_path, content, ours):
    (tmp_path / JOURNAL).write_bytes(content)
    assert is_journal(tmp_path / JOURNAL) == ours


@pytest.mark.parametrize("locks", [True, False])
def test_a_new_start_replaces_the_journal_and_keeps_its_lock(tmp_path, monkeypatch, locks):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if not locks:
        monkeypatch.setattr(fcntl, "flock", flock)
    first, second, third = (Journal(tmp_path) for _ in range(3))
    first.start({"fingerprint": "one"})
    first.append("block", "0", {})
    with pytest.raises(ConfigError, match="another run is writing to"):
        second.open()
    with pytest.raises(ConfigError, match="another run is writing to"):
        second.start({"fingerprint": "two"})
    first.close()
    second.open()
    second.start({"fingerprint": "two"})
    with pytest.raises(ConfigError, match="another run is writing to"):
        third.open()
    second.append("block", "1", {})
    assert [*read_journal(second.path)] == [START, ("block", "1")]
    second.close()
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL]


@pytest.mark.parametrize(
    "values",
    [{"files": ["a"]}, {"files": {"a": 1}}, {"files": "a"}, {"writes": "abc"}, {"writes": [1]}],
)
def test_an_entry_whose_files_are_no_names_ends_the_journal(journal, values):
    """As another version might write them: what a journal names may be removed."""
    before = read_journal(journal.path)
    journal.append("block", "2", values)
    assert read_journal(journal.path) == before


def test_a_folder_that_was_replaced_is_noticed(tmp_path):
    made = Journal(tmp_path / "out")
    made.check_in_place()
    (tmp_path / "out").mkdir()
    made.start({})
    made.check_in_place()
    (tmp_path / "out").rename(tmp_path / "moved")
    for replace in (lambda: None, (tmp_path / "out").mkdir, (tmp_path / "out" / JOURNAL).touch):
        replace()
        with pytest.raises(CheckpointError, match="out: was moved, removed or replaced while"):
            made.check_in_place()
    made.close()
