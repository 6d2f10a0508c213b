"""Readers run under watch: little memory, nothing executed, nothing opened outside a folder."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from prunekit.errors import CheckpointError, ConfigError
from tests.conftest import ROOT

ROOM = 1 << 28
"""Bytes that a reader may allocate for a file of some kilobytes."""
OURS = tuple({str(Path(place).resolve()) for place in (sys.prefix, sys.base_prefix)}) + tuple(
    str(ROOT / package) for package in ("prunekit", "kernels")
)
"""Locations of modules that may be imported lazily."""
RUNS_OR_CHANGES = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir",
    "os.symlink", "os.link", "os.truncate", "subprocess.", "shutil.", "pickle.", "socket.",
)  # fmt: skip
_inside: list[Path] = []
_watching = True


def replace_file(file: Path, content: bytes) -> None:
    # Some file systems flush an overwritten file to disk at once, but not a new file.
    file.unlink(missing_ok=True)
    file.write_bytes(content)


@contextmanager
def unwatched() -> Iterator[None]:
    """Suspend the watch, while libraries are imported for the first time."""
    global _watching  # noqa: PLW0603
    _watching = False
    try:
        yield
    finally:
        _watching = True


def result(folder: Path, read: Callable[..., Any], *arguments: object) -> Any:
    """Return a reader's result, or None if it refuses the file."""
    with _watch(folder) if _watching else nullcontext():
        try:
            return read(*arguments)
        except (CheckpointError, ConfigError):
            return None


@contextmanager
def _watch(folder: Path) -> Iterator[None]:
    with _limited_memory(), _restricted_to(folder):
        yield


@contextmanager
def _restricted_to(folder: Path) -> Iterator[None]:
    """Forbid opening files outside ``folder``, changing files, and running its code."""
    _inside.append(folder.resolve())
    try:
        yield
    finally:
        _inside.pop()


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Limit this process to ``ROOM`` more bytes of address space.

    Exceeding the limit raises an out-of-memory error.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _importing() -> bool:
    """Return whether a module is being imported, which may execute generated code."""
    frame = sys._getframe()
    while frame := frame.f_back:
        if frame.f_code.co_name == "_find_and_load":
            return True
    return False


def _audit(event: str, arguments: tuple) -> None:
    if not _inside:
        return
    assert not event.startswith(RUNS_OR_CHANGES), f"{event} {arguments}"
    if event == "open" and isinstance(arguments[0], str | bytes):
        name, mode = str(Path(str(arguments[0])).absolute()), arguments[1] or "r"
        within = name.startswith(f"{_inside[-1]}/")
        assert within or name.startswith(OURS), f"opens {name}"
        assert mode in {"r", "rb"}, f"opens {name} as {mode}"
    if event == "exec":
        name = getattr(arguments[0], "co_filename", "")
        assert name.startswith(("<frozen", *OURS)) or _importing(), f"runs {name}"


sys.addaudithook(_audit)
