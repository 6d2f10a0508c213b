"""Every Triton kernel compiles for all targets, without spilling.

``python -m tests.aot.record`` writes the resources of each to ``bench/results/aot.json``.
"""

import json
import os

import pytest

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

triton = pytest.importorskip("triton")

from tests.aot.compile_only import SHARED_LIMITS, compile_only, usage  # noqa: E402
from tests.aot.launches import everywhere, launches  # noqa: E402
from tests.aot.record import FILE, compiled, key  # noqa: E402

RECORD = json.loads(FILE.read_text())
STALE = "bench/results/aot.json is of other kernels: run python -m tests.aot.record [OP …]"


@pytest.mark.parametrize(("target", "launch"), everywhere(), ids=str)
def test_compiles_without_spills(target, launch, monkeypatch):
    with compile_only(target, monkeypatch) as launched:
        launch.run()
    assert launched
    for kernel in launched:
        taken = usage(kernel)
        assert taken.spilled <= launch.most_spilled(target), kernel.metadata.name
        assert taken.shared <= SHARED_LIMITS[target] * 1024, kernel.metadata.name
    # Another Triton comes with another assembler, which takes other registers for the same code.
    if RECORD["versions"]["triton"] == triton.__version__:
        recorded = [row for row in RECORD["rows"] if same(row, target, launch)]
        assert compiled(target, launch, launched) == recorded, STALE


def test_the_record_is_of_these_kernels():
    recorded = {(row["target"], row["op"], row["what"]) for row in RECORD["rows"]}
    assert recorded == {key(target, launch) for target, launch in everywhere()}, STALE
    allowed = {str(launch): launch for launch in launches()}
    for row in RECORD["rows"]:
        launch = allowed[f"{row['op']}: {row['what']}"]
        assert row["spilled"] <= launch.most_spilled(row["target"]), row


def same(row, target, launch):
    return (row["target"], row["op"], row["what"]) == key(target, launch)
