"""Outcomes of injected faults, and the table made of them.

A test calls ``record`` once it has seen the outcome. The records of all processes of a test run go
into one file each in the folder of ``PRUNEKIT_FAULTS``; without that variable they are dropped.

``python -m tests.support.fault_table`` runs the tests of faults and writes
``bench/results/faults.md``; ``--soak`` runs the random kills too.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "bench/results/faults.md"
VARIABLE = "PRUNEKIT_FAULTS"
TESTS = (
    "tests/test_faults.py",
    "tests/test_exhausted.py",
    "tests/test_file_systems.py",
    "tests/distributed",
)
HEAD = ("| kind | fault | outcome |", "|---|---|---|")


def record(kind: str, fault: str, outcome: str) -> None:
    """Record the outcome of a fault that a test has injected.

    Args:
        kind: Group of the row, such as "disk", "signal" or "ranks".
        fault: The fault and its moment.
        outcome: What happened, as the test has asserted it.
    """
    if folder := os.environ.get(VARIABLE):
        with Path(folder, f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps([kind, fault, outcome]) + "\n")


def table(folder: Path) -> str:
    """Return the recorded outcomes as a table in Markdown, sorted and each once."""
    lines = {line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()}
    rows = [f"| {' | '.join(map(_cell, row))} |" for row in sorted(map(json.loads, lines))]
    return "\n".join([*HEAD, *rows]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(arguments: list[str]) -> int:
    """Run the tests of faults and, if all pass, write the table."""
    marks = "not gpu" if "--soak" in arguments else "not gpu and not soak"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-m", marks, *TESTS]
        environment = os.environ | {VARIABLE: folder}
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if code == 0:
            TABLE.write_text(table(Path(folder)), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
