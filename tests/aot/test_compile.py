"""Every Triton kernel compiles for GPUs that need not be here, and spills no registers.

``python -m tests.aot.record`` writes what each takes to ``bench/results/aot.json``.
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
from tests.aot.record import FILE, key  # noqa: E402


@pytest.mark.parametrize(("target", "launch"), everywhere(), ids=str)
def test_compiles_without_spills(target, launch, monkeypatch):
    with compile_only(target, monkeypatch) as launched:
        launch.run()
    assert launched
    for kernel in launched:
        taken = usage(kernel)
        assert taken.spilled <= launch.spills, kernel.metadata.name
        assert taken.shared <= SHARED_LIMITS[target] * 1024, kernel.metadata.name


def test_the_record_is_of_these_kernels():
    rows = json.loads(FILE.read_text())["rows"]
    recorded = {(row["target"], row["op"], row["what"]) for row in rows}
    assert recorded == {key(target, launch) for target, launch in everywhere()}
    allowed = {str(launch): launch.spills for launch in launches()}
    for row in rows:
        assert row["spilled"] <= allowed[f"{row['op']}: {row['what']}"], row
