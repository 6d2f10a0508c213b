"""Contents of the report of a sparsify run."""

import pytest

from prunekit.checkpoint.formats import WeightLayout
from prunekit.checkpoint.output import OutputFolder
from prunekit.runs.sparsify import result
from tests.support import checkpoints
from tests.support.checkpoints import planned

FRAME = {
    "prunekit": "0",
    "config": {},
    "model": {"path": "m"},
    "calibration": {"samples": 4},
    "evaluation": [],
    "seconds": {"total": 1.0},
    "memory": {"peak_rss_bytes": 1},
    "notes": [],
    "proof": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"))


@pytest.fixture
def output(tmp_path):
    made = OutputFolder(tmp_path / "out", 1)
    made.begin("fingerprint", resume=False, overwrite=False)
    yield made
    made.close()


def test_achieved_sparsity_is_counted_over_pruned_and_over_all_weights(folder, tmp_path):
    plan = planned(folder, tmp_path / "out", prune={"skip": ["*.q_proj"]})
    facts = result.sparsity_facts(plan, {"zeros": plan.prunable // 2, "violations": 3})
    assert (facts["target"], facts["achieved"], facts["violations"]) == (0.5, 0.5, 3)
    assert facts["whole_model"] == facts["zeros"] / plan.parameters < 0.5
    assert facts["pattern"] == "2:4"


def test_the_report_joins_frame_and_facts_in_the_order_of_the_format(folder, output):
    plan = planned(folder, output.folder)
    counted = {"zeros": 0, "violations": 0}
    made = result.report(plan, FRAME, output, [{"name": "a"}], {}, counted)
    assert made["calibration"]["gathers"] == ["column_energy", "sampled_gram"]
    assert made["memory"].keys() == {
        "peak_rss_bytes", "block_bytes", "statistics_bytes", "hidden_bytes",
    }  # fmt: skip
    order = [*made]
    assert order.index("sparsity") < order.index("storage") < order.index("layers")
    assert order[-1] == "proof"
    without = result.report(plan, {**FRAME, "calibration": None}, output, [], {}, counted)
    assert without["calibration"] is None


def test_storage_counts_files_and_compressed_layers(folder, output):
    (output.folder / "a.safetensors").write_bytes(b"12345")
    dense = planned(folder, output.folder)
    facts = result.storage_facts(dense, output, {}, unfit=0)
    assert facts["bytes"] == 5
    assert facts["bytes_before"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert "neither space nor time" in facts["speed"]
    packed = planned(folder, output.folder, output={"format": "2:4"})
    layouts = {"a": WeightLayout(32, 32, 512)}
    facts = result.storage_facts(packed, output, layouts, unfit=2)
    assert (facts["compressed"], facts["dense"]) == (1, 2)


@pytest.mark.parametrize(
    ("sparsity", "zeros", "said"),
    [
        (0.7, 0.7, None),
        (0.7, 0.6996, None),
        (0.7, 0.6875, "70 % of the weights were asked for as zeros, 68.75 % are"),
        (0.5, 0.51, "more were zero before"),
    ],
)
def test_zeros_that_are_not_those_asked_for_are_remarked(folder, tmp_path, sparsity, zeros, said):
    prune = {"pattern": "unstructured", "sparsity": sparsity}
    plan = planned(folder, tmp_path / "out", prune=prune)
    found = result.sparsity_remarks(plan, {"zeros": round(zeros * plan.prunable)})
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
