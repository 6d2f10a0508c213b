"""Virtual environment of a checkout, created with only Python and pip."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv"
CONSTRAINTS = ROOT / "tests" / "constraints.txt"
OLDEST = (3, 11)


class SetupError(Exception):
    """The environment cannot be created; the message says why."""


def python(extra: str) -> Path:
    """Return the interpreter of ``.venv`` with this checkout installed.

    Versions are those of ``tests/constraints.txt``. An installation is reused until they or
    ``pyproject.toml`` change. ``extra`` is the optional dependency group to install.

    Raises:
        SetupError: This Python is too old, or pip could not install the requirements.
    """
    if sys.version_info < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise SetupError(f"prunekit needs Python {oldest} or newer, this is {sys.version}")
    interpreter = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + CONSTRAINTS.read_bytes())
    stamp = FOLDER / f"installed-{extra}"
    if not _runs(interpreter):
        _create(interpreter)
    elif stamp.is_file() and stamp.read_text("utf-8") == wanted.hexdigest():
        return interpreter
    stamp.unlink(missing_ok=True)
    print(f"Installing prunekit[{extra}] into {FOLDER}: some minutes, only this once", flush=True)
    requirement = [f"{ROOT}[{extra}]", "--constraint", str(CONSTRAINTS)]
    _pip([str(interpreter), "-m", "pip"], ["--editable", *requirement])
    stamp.write_text(wanted.hexdigest(), "utf-8")
    return interpreter


def _create(interpreter: Path) -> None:
    complete = importlib.util.find_spec("ensurepip") is not None
    venv.create(FOLDER, with_pip=complete, clear=True)
    if not complete:  # Debian's Python without python3-venv
        _pip([sys.executable, "-m", "pip", "--python", str(interpreter)], ["pip"])


def _runs(interpreter: Path) -> bool:
    try:
        command = [str(interpreter), "-c", "import pip"]
        return not subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ).returncode
    except OSError:
        return False


def _pip(pip: list[str], requirements: list[str]) -> None:
    quiet = [] if sys.stdout.isatty() else ["-qq"]
    # Python compiles the modules that it imports; pip would compile all, which takes a minute.
    options = [*quiet, "--no-compile", "--disable-pip-version-check"]
    command = [*pip, "install", *options, *requirements]
    if subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode:
        raise SetupError(f"pip could not install {requirements[-1]}; its own words are above")
