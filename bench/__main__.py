"""Run benchmarks: ``python -m bench [--tested] [--uncompiled] [OP …]``; without an op, list them.

The tests of an op run first, unless ``--tested`` says that they have just passed. An op whose tests
fail is not measured; the others are. ``--uncompiled`` leaves out what ``torch.compile`` makes.
"""

import importlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "kernels"))

from bench.harness import measure  # noqa: E402  the kernels' folder has to be found first


def ops() -> list[str]:
    """Return the operations that have a benchmark and a test."""
    return sorted(
        file.stem
        for file in (HERE / "ops").glob("*.py")
        if (HERE.parent / _tests(file.stem)).exists()
    )


def main(chosen: list[str]) -> int:
    """Measure each chosen op whose tests pass; return the exit code."""
    tested, uncompiled = "--tested" in chosen, "--uncompiled" in chosen
    chosen = [op for op in chosen if op not in ("--tested", "--uncompiled")]
    if not chosen:
        print("python -m bench OP …, where OP is one of:", *ops(), sep="\n  ")
        return 0
    unknown = set(chosen) - set(ops())
    if unknown:
        print(f"no such bench: {', '.join(sorted(unknown))}. Choose: {', '.join(ops())}.")
        return 2
    failed = []
    for op in chosen:
        if not tested and _red(op):
            failed.append(f"{op}: its tests fail, so its speed means nothing; not measured.")
            continue
        bench = importlib.import_module(f"bench.ops.{op}")
        failed += measure.measure(op, bench, compile_contestants=not uncompiled)
    print(*failed, sep="\n")
    return 1 if failed else 0


def _tests(op: str) -> str:
    return f"tests/kernels/test_{op}.py"


def _red(op: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", _tests(op)]
    return (
        subprocess.run(command, stdin=subprocess.DEVNULL, cwd=HERE.parent, check=False).returncode
        != 0
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
