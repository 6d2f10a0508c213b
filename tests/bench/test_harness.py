"""Results that benchmarks write."""

import json
import sys
import types

import pytest
import torch

from bench.harness import measure, table
from bench.jobs import end_to_end
from bench.quality import peer_quality
from bench.structured import table as structured_table


def result(share, why=None):
    row = {
        "case": "a", "dtype": "float32", "contestant": "prunekit", "share_of_floor": share,
        "milliseconds": {"median": 2.0}, "bytes_per_second": 1.0, "flops_per_second": 0.0,
    }  # fmt: skip
    return {"machine": {"copy_bytes_per_second": 1.0}, "why": why, "rows": [row]}


def written(folder, **results):
    for op, found in results.items():
        (folder / f"{op}.json").write_text(json.dumps(found))
    return table.write(folder).read_text()


def test_the_table_says_why_a_kernel_stays_below_half_of_its_floor(tmp_path):
    text = written(
        tmp_path,
        slow=result(0.1, "it makes\n four passes."),
        quick=result(0.7, "nobody asks."),
        new=result(0.2),
    )
    assert "- `slow`: it makes four passes." in text
    assert "- `new`: not analysed yet." in text
    assert "nobody asks" not in text


def test_no_heading_where_all_are_near_their_floor(tmp_path):
    assert "Why" not in written(tmp_path, quick=result(0.7))


def test_work_in_place_is_prepared_before_each_run_and_not_timed(tmp_path, monkeypatch):
    calls = []
    case = measure.Case(
        "a", {}, torch.float32, bytes=8, flops=0,
        contestants={"prunekit": lambda: calls.append("run")},
        prepare=lambda: calls.append("prepare"),
    )  # fmt: skip
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "copy_rate", lambda _: 1.0)
    monkeypatch.setattr(measure.roofline, "draw", lambda folder: folder)
    measure.measure("op", types.SimpleNamespace(cases=lambda _: [case], WHY={"cpu": "so"}))
    assert set(zip(calls[::2], calls[1::2], strict=True)) == {("prepare", "run")}
    (file,) = tmp_path.glob("*/op.json")
    found = json.loads(file.read_text())
    assert found["rows"][0]["runs"] == len(calls) // 2 - 1
    assert found["why"] == ("so" if not torch.cuda.is_available() else None)


def test_a_machine_without_a_command_is_described_without_it():
    assert measure._output("no-such-command-anywhere") is None
    assert measure._output(sys.executable, "-c", "print(1)") == "1"


# PyTorch warns of itself when its compiler is imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("op", ["column_energy", "gram", "packed_mask", "selection"])
def test_benches_of_kernels_yield_cases_with_ours_first(op):
    module = __import__(f"bench.ops.{op}", fromlist=["cases"])
    case = next(module.cases(torch.device("cpu")))
    assert next(iter(case.contestants)) == "prunekit"
    assert case.bytes > 0


def row(contestant, quality, seed=0, scores=(1.0, 2.0, 3.0)):
    return {
        "model": "m", "kind": "heads", "metric": "perplexity", "units": 3, "seed": seed,
        "contestant": contestant, "quality": quality, "scores": list(scores),
    }  # fmt: skip


def test_who_beats_random_is_counted_only_beyond_its_deviation():
    rows = [
        row("random", [10.0, 20.0, 30.0, 50.0]),
        row("random", [12.0, 24.0, 30.0, 50.0], seed=1),
        row("entropy", [10.5, 18.0, 29.0, 51.0], scores=(3.0, 2.0, 1.0)),
        row("leave-one-out", [9.0, 25.0, 30.0, 99.0]),
    ]
    text = structured_table.page([{"model": "m", "dense": 8.0, "rows": rows, "speed": []}])
    assert "| random | 11 ± 1.4 | 22 ± 2.8 | 30 | **50** | 1.00 |" in text
    assert "| entropy | 10.5 | **18** | **29** | 51 | -1.00 |" in text
    assert "| entropy | 2 | 4 |" in text
    assert "| leave-one-out | 1 | 4 |" in text


def test_rows_of_before_the_floor_was_measured_stay_in_the_table():
    old = {
        "model": "m", "method": "wanda", "pattern": "2:4",
        "prunekit": {"seconds": 2.0, "peak_rss_bytes": 2**30, "prune_seconds": 1.0,
                     "perplexity": 9.0},
        "llm-compressor": {"seconds": 4.0, "peak_rss_bytes": 2**31, "perplexity": 9.5},
    }  # fmt: skip
    new = {**old, "prunekit": {**old["prunekit"], "job_seconds": 1.0}, "floor_seconds": 0.5}
    new["llm-compressor"] = {**old["llm-compressor"], "job_seconds": 4.0}
    new["llm-compressor in float32"] = {"seconds": 5.0, "peak_rss_bytes": 2**31}
    first, second = end_to_end.table([old, new]).splitlines()[-2:]
    assert "| 0.50 | — | 0.50 | 9.000 / 9.500 | — |" in first
    assert "| 0.50 | 0.25 | 0.50 | 9.000 / 9.500 | 0.5 s | 50% | 5.0 s, 2.00 GiB | 0.40 |" in second


def test_a_peer_that_came_later_is_measured_and_what_is_known_is_not(monkeypatch):
    asked = []

    def perplexities(job, method, row, peer, folder):
        asked.append(method)
        return dict.fromkeys(peer_quality._columns(method, peer), 2.0)

    monkeypatch.setattr(peer_quality, "_perplexities", perplexities)
    known = {"pattern": "2:4", "dense": 1.0, "wanda": 2.0, "magnitude": 3.0}
    methods = ("magnitude", "wanda")
    assert peer_quality.measure(None, known, methods, None) == known
    row = peer_quality.measure(None, known, methods, "python")
    assert row == known | {f"wanda{peer_quality.PEER}": 2.0}
    assert asked == ["wanda"]
