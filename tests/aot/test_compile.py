"""Every Triton kernel compiles for all targets, without spilling.

``python -m tests.aot.record`` writes the resources of each to ``bench/results/aot.json``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

triton = pytest.importorskip("triton")

from tests.aot.compile_only import SHARED_LIMITS, Known, compile_only, usage  # noqa: E402
from tests.aot.launch import FRAME  # noqa: E402
from tests.aot.launches import everywhere, launches  # noqa: E402
from tests.aot.record import FILE, compiled, key  # noqa: E402

ROOT = Path(__file__).parents[2]
RECORD = json.loads(FILE.read_text())
STALE = "bench/results/aot.json is of other kernels: run python -m tests.aot.record [OP …]"
SAMPLE = {launch.op: str(launch) for launch in reversed(launches())}
"""One launch of each op, compiled for one target in any case, so that the record is tested."""


@pytest.mark.parametrize(("target", "launch"), everywhere(), ids=str)
def test_compiles_without_spills(target, launch, monkeypatch):
    """Kernels whose key, Triton's hash of all that decides the code, is recorded are known."""
    sampled = target == "sm_90" and SAMPLE[launch.op] == str(launch)
    known = {row["key"] for row in RECORD["rows"] if same(row, target, launch) and not sampled}
    with compile_only(target, monkeypatch, known) as launched:
        launch.run()
    check(target, launch, launched)


@pytest.mark.soak
@pytest.mark.parametrize(("target", "launch"), everywhere(), ids=str)
def test_the_record_is_true(target, launch, monkeypatch):
    with compile_only(target, monkeypatch) as launched:
        launch.run()
    check(target, launch, launched)


def check(target, launch, launched):
    assert launched
    for kernel in launched:
        if not isinstance(kernel, Known):
            taken = usage(kernel)
            assert taken.spilled <= launch.most_spilled(target), kernel.metadata.name
            assert taken.shared <= SHARED_LIMITS[target] * 1024, kernel.metadata.name
    # Another Triton comes with another assembler, which takes other registers for the same code.
    if RECORD["versions"]["triton"] == triton.__version__:
        recorded = [row for row in RECORD["rows"] if same(row, target, launch)]
        known = {row["key"]: row for row in recorded}
        found = [
            known[kernel.key]
            if isinstance(kernel, Known)
            else compiled(target, launch, [kernel])[0]
            for kernel in launched
        ]
        fields = {name for row in recorded for name in row}
        found = [{name: row[name] for name in fields & {*row}} for row in found]
        assert by_kernel(found) == by_kernel(recorded), STALE


def by_kernel(rows):
    return sorted(json.dumps(row, sort_keys=True) for row in without_keys(rows))


def without_keys(rows):
    """Return rows without their keys, which change with a comment; repeated rows count once."""
    kept = ({name: value for name, value in row.items() if name != "key"} for row in rows)
    return [json.loads(row) for row in dict.fromkeys(map(json.dumps, kept))]


def test_the_record_is_of_these_kernels():
    recorded = {(row["target"], row["op"], row["what"]) for row in RECORD["rows"]}
    assert recorded == {key(target, launch) for target, launch in everywhere()}, STALE
    allowed = {str(launch): launch for launch in launches()}
    for row in RECORD["rows"]:
        launch = allowed[f"{row['op']}: {row['what']}"]
        assert row["spilled"] <= launch.most_spilled(row["target"]), row
        assert row["shared"] <= SHARED_LIMITS[row["target"]] * 1024, row


SPILLS_BESIDE = {("3.6.0", "gram"): 80, ("3.6.0", "score_and_mask"): 72}
"""Bytes of stack per thread that other versions of Triton may take, by op; else a frame."""


def test_versions_beside_fit_too():
    assert RECORD["beside"]
    for version, rows in RECORD["beside"].items():
        recorded = {(row["target"], row["op"], row["what"]) for row in rows}
        assert recorded == {key(target, launch) for target, launch in everywhere()}, STALE
        for row in rows:
            most = SPILLS_BESIDE.get((version, row["op"]), FRAME)
            assert row["spilled"] <= most, (version, row)
            assert row["shared"] <= SHARED_LIMITS[row["target"]] * 1024, (version, row)


@pytest.mark.soak
@pytest.mark.parametrize("version", RECORD.get("beside", {}))
def test_a_version_beside_compiles_as_recorded(version):
    folder = os.environ.get("PRUNEKIT_TRITON_BESIDE", "")
    if not Path(folder, f"triton-{version}.dist-info").is_dir():
        pytest.skip(f"triton {version} is not in PRUNEKIT_TRITON_BESIDE")
    code = "import json; from tests.aot import record; print(json.dumps(record.rows('sm_90', %r)))"
    recorded = [row for row in RECORD["beside"][version] if row["target"] == "sm_90"]
    env = os.environ | {"PYTHONPATH": f"{folder}:.:kernels"}
    command = [sys.executable, "-c", code % {row["op"] for row in recorded}]
    done = subprocess.run(
        command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert by_kernel(found) == by_kernel(recorded), STALE


def same(row, target, launch):
    return (row["target"], row["op"], row["what"]) == key(target, launch)
