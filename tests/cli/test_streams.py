"""Standard streams that are closed, full, or without the characters of a message."""

import subprocess
import sys

import pytest

from tests.support.processes import python

SCHEMA = (sys.executable, "-m", "prunekit", "schema")
FULL = "standard output: cannot be written: No space left on device.\n"


def shell(command):
    """Run a shell command with "$@" as ``prunekit schema``, which prints signs beyond ASCII."""
    return subprocess.run(["bash", "-c", command, "-", *SCHEMA], capture_output=True, check=False)


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ('"$@" > /dev/full', 1, FULL),
        (
            '"$@" | true; exit ${PIPESTATUS[0]}',
            1,
            FULL.replace("No space left on device", "Broken pipe"),
        ),
        ('"$@" >&-', 1, FULL.replace("No space left on device", "Bad file descriptor")),
        ('"$@" 2>&- <&-', 0, ""),
        ('PYTHONIOENCODING=ascii "$@"', 0, ""),
        ('"$@" --nothing 2> /dev/full', 2, ""),
    ],
)
def test_a_stream_that_cannot_be_written_ends_in_an_exit_code(command, code, error):
    done = shell(command)
    assert (done.returncode, done.stderr.decode()) == (code, error)


CLOSED = """
import os, sys
from contextlib import suppress
from prunekit.cli.streams import guard_streams
from prunekit.errors import PrunekitError
guard_streams()
file = open("shard", "w")
with suppress(PrunekitError):
    print("lost", file=sys.stdout, flush=True)
print("lost", file=sys.stderr, flush=True)
with suppress(OSError):
    os.write(2, b"lost by a library")
sys.exit(file.fileno() < 3 or os.path.getsize("shard"))
"""


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path):
    command = 'cd "$1"; "$2" -c "$3" <&- >&- 2>&-'
    arguments = ["-", str(tmp_path), sys.executable, CLOSED]
    assert subprocess.run(["bash", "-c", command, *arguments], check=False).returncode == 0
    assert (tmp_path / "shard").read_text() == ""


def test_a_path_is_shown_as_it_is_without_commands_to_the_terminal():
    done = python("-m", "prunekit", "plan", "a[/b]\x1b[31m:x:é.toml")
    assert done.returncode == 2
    assert done.stderr.startswith("a[/b]\\x1b[31m:x:é.toml: no such file. ")
