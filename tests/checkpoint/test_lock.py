"""Locks, with and without those of the file system."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from prunekit.checkpoint.lock import FileLock, LockedError, _owner, is_held, owner_file


@pytest.fixture
def without_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


def lock(path):
    file = path.open("ab")
    try:
        return file, FileLock(file, path)
    except BaseException:
        file.close()
        raise


def test_a_lock_excludes_and_ends_with_its_file(tmp_path):
    file, _ = lock(tmp_path / "a")
    with pytest.raises(LockedError):
        lock(tmp_path / "a")
    file.close()
    lock(tmp_path / "a")[0].close()


def asked(path):
    with path.open("rb") as file:
        return is_held(file, path)


def test_who_asks_for_a_lock_does_not_hold_it(tmp_path):
    (tmp_path / "a").touch()
    with (tmp_path / "a").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # another one who asks
        assert not asked(tmp_path / "a")
    file, _ = lock(tmp_path / "a")
    assert asked(tmp_path / "a")
    file.close()
    assert not asked(tmp_path / "a")


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_file_of_the_owner_is_asked(tmp_path):
    (tmp_path / "a").touch()
    assert not asked(tmp_path / "a")
    file, held = lock(tmp_path / "a")
    assert asked(tmp_path / "a")
    held.release()
    assert not asked(tmp_path / "a")
    file.close()


def test_another_error_of_a_lock_is_no_lock(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"):
        lock(tmp_path / "a")


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_file_names_the_owner(tmp_path):
    file, first = lock(tmp_path / "a")
    with pytest.raises(LockedError, match=f"process {os.getpid()} on .*remove .*/.a.lock"):
        lock(tmp_path / "a")
    first.release()
    assert not owner_file(tmp_path / "a").exists()
    file.close()
    file, again = lock(tmp_path / "a")
    again.release()
    file.close()


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({"process": 2**22 + 1, "started": ""}, True),  # no process has such a number
        ({"started": "1"}, True),  # the number was given to another process
        ({"boot": "before"}, True),
        ({"host": "elsewhere", "process": 2**22 + 1}, False),
        ({"process": None}, False),
    ],
)
def test_an_owner_that_has_ended_holds_nothing(tmp_path, change, free):
    owner_file(tmp_path / "a").write_text(json.dumps(_owner(os.getpid()) | change))
    if free:
        lock(tmp_path / "a")[0].close()
        return
    with pytest.raises(LockedError, match="If it was killed there, remove"):
        lock(tmp_path / "a")


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize("content", ["", "[]", "{", '"x"'])
def test_a_damaged_owner_is_not_overruled(tmp_path, content):
    owner_file(tmp_path / "a").write_text(content)
    with pytest.raises(LockedError, match=r"process \? on \?"):
        lock(tmp_path / "a")


def test_a_killed_process_holds_nothing(tmp_path):
    code = f"open({str(tmp_path / 'a')!r}, 'ab'); import fcntl, os; os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    lock(tmp_path / "a")[0].close()
