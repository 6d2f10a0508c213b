"""Run all tests on a fresh machine with Python and pip: ``python3 tests/run.py``.

Creates ``.venv`` and runs the tiers named, or all. Each tier is a process of its own, since kernels
are interpreted in one, compiled ahead of time in another, and run on a GPU in a third.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that bench is found

from bench.harness import environment, vllm_environment

ROOT = environment.ROOT
MOST_WORKERS = 4
LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"
CUDA = "import sys, torch; sys.exit(not torch.cuda.is_available())"
SINGLE_PROCESS = ("tests", "--ignore=tests/distributed", "--ignore=tests/aot")
NOT_PASSED_ON = {"TRITON_INTERPRET", "PYTHONDONTWRITEBYTECODE"}
"""Variables of the user that would change a tier, or compile every file in every process."""
ORDINARY = "not interpret and not aot and not gpu and not soak and not serve"


def check() -> int:
    """Lint, formatting, types, and the import contracts of setup.cfg."""
    return (
        _python("-m", "ruff", "check", ".")
        | _python("-m", "ruff", "format", "--check", ".")
        | _python("-m", "pyright", "--pythonpath", sys.executable)
        | _python("-c", LINT_IMPORTS)
    )


def fast() -> int:
    """Run ``check``, and the tests of ``cpu`` that are not slow."""
    return check() | _pytest("-m", f"{ORDINARY} and not slow", *SINGLE_PROCESS)


def cpu() -> int:
    """All tests that need neither a GPU nor Triton."""
    return _pytest("-m", ORDINARY, *SINGLE_PROCESS)


def interpret() -> int:
    """Each Triton kernel against its reference, in Triton's interpreter."""
    return _pytest("-m", "not soak", "tests/kernels", TRITON_INTERPRET="1")


def aot() -> int:
    """Each Triton kernel compiled for GPUs that need not be present."""
    return _pytest("-m", "aot and not soak", "tests/aot")


def gpu() -> int:
    """Each Triton kernel compiled and run, and other tests that need a GPU."""
    if _python("-c", CUDA):
        return _skipped("gpu", "no CUDA device")
    return _pytest("-m", "gpu or interpret", "tests", workers=1)


def dist() -> int:
    """Jobs that are shared by several processes."""
    # A file's worlds are compared with one another, so each file is one worker's.
    return _pytest("-m", "not soak", "tests/distributed", spread="loadfile")


def soak() -> int:
    """200 kills, lost hosts, fuzzing, all kernels and families; two hours, not part of all."""
    return _pytest("-m", "soak", "tests", workers=1) | _pytest(
        "-m", "soak", "tests/kernels", TRITON_INTERPRET="1"
    )


def serve() -> int:
    """Checkpoints served by vLLM itself, in .venv-vllm, or in that of PRUNEKIT_VLLM; not of all."""
    interpreter = vllm_environment.find() or vllm_environment.make()
    # What vLLM warns of is not ours to change.
    chosen = ("-m", "serve", "-W", "ignore", "--show-capture=no", "tests/inference/vllm")
    return _python("-m", "pytest", "-q", *chosen, interpreter=interpreter)


ALL: tuple[Callable[[], int], ...] = (check, cpu, interpret, aot, gpu, dist)
TIERS = {tier.__name__: tier for tier in (fast, soak, serve, *ALL)}


def main(arguments: list[str]) -> int:
    """Run tiers; return 0 if all passed."""
    described = "\n".join(f"  {name:10}{tier.__doc__}" for name, tier in TIERS.items())
    parser = argparse.ArgumentParser(
        description="Set up .venv and run the tests.",
        epilog=f"tiers (all: every one except fast, soak and serve):\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tiers", nargs="*", metavar="TIER", help=", ".join([*TIERS, "all"]))
    parser.add_argument("--here", action="store_true", help="use the current Python, no .venv")
    given = parser.parse_args(arguments)
    chosen = [name for name in given.tiers or ["all"] if name != "all"]
    if unknown := set(chosen) - set(TIERS):
        parser.error(f"no such tier: {', '.join(sorted(unknown))}; choose {', '.join(TIERS)}, all")
    if "all" in given.tiers or not given.tiers:
        chosen += [tier.__name__ for tier in ALL]
    if given.here:
        return _run(list(dict.fromkeys(chosen)))
    try:
        interpreter = environment.python("dev")
    except environment.SetupError as error:
        print(error, file=sys.stderr)
        return 1
    command = [str(interpreter), str(Path(__file__).resolve()), "--here", *chosen]
    return subprocess.run(command, check=False).returncode


def _run(names: list[str]) -> int:
    summary, failed = [], False
    for name in names:
        print(f"\n=== {name}: {TIERS[name].__doc__}", flush=True)
        began = time.monotonic()
        try:
            code = TIERS[name]()
        except environment.SetupError as error:
            code = _failed(name, error)
        failed |= bool(code)
        summary.append(f"{name:10}{'FAILED' if code else 'ok':8}{time.monotonic() - began:5.0f} s")
    if {tier.__name__ for tier in ALL} <= {*names} and "serve" not in names:
        summary.append("serve     not run: python3 tests/run.py serve installs vLLM, and needs it")
    print("\n" + "\n".join(summary), flush=True)
    return int(failed)


def _pytest(
    *arguments: str, workers: int | None = None, spread: str = "worksteal", **variables: str
) -> int:
    """Run pytest and return 0, or 1; no test found is a failure (exit code 5).

    Neighbours share fixtures, so they start on one worker; who is idle takes over some.
    """
    # Only here: the first process of a fresh machine may have an older Python.
    from prunekit.models.cgroups import usable_cpus

    workers = workers or min(usable_cpus(), MOST_WORKERS)
    shared = ("-n", str(workers), "--dist", spread) if workers > 1 else ()
    return _python("-m", "pytest", "-q", *shared, *arguments, **variables)


def _python(*arguments: str, interpreter: Path | None = None, **variables: str) -> int:
    """Run Python, the current one by default, in the root of the checkout; return 0 or 1."""
    clean = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [str(interpreter or sys.executable), *arguments]
    print("$", *arguments, flush=True)
    done = subprocess.run(
        command, cwd=ROOT, env=clean | {"PYTHONPATH": path} | variables, check=False
    )
    return int(done.returncode != 0)


def _failed(name: str, reason: object) -> int:
    print(f"{name}: {reason}", flush=True)
    return 1


def _skipped(name: str, reason: str) -> int:
    print(f"{name}: skipped, {reason}", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
