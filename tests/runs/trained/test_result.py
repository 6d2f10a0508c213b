"""Contents of the report of a run that prunes weights and trains the model."""

from prunekit.checkpoint.output import OutputFolder
from prunekit.runs.trained import result
from tests.runs.sparsify.test_result import FRAME
from tests.support import checkpoints
from tests.support.trained import planned


def test_a_report_has_the_training_the_memory_by_use_and_a_remark_on_other_counts(tmp_path):
    folder = checkpoints.write(tmp_path / "model")
    plan = planned(folder, tmp_path / "out", {"sparsity": 0.5, "end": 4})
    output = OutputFolder(tmp_path / "out", 1)
    output.begin("fingerprint", resume=False, overwrite=False)
    trained = {"layers": [], "training": {"steps": 6}}
    counted = {"zeros": plan.prunable // 4, "violations": 0}
    found = result.report(plan, FRAME, output, trained, counted)
    output.close()
    assert found["training"] == {"steps": 6}
    assert found["sparsity"]["achieved"] == 0.25
    assert any("25 %" in note for note in found["notes"])
    assert found["memory"]["training_bytes"] == plan.memory["training"]
    assert found["memory"]["hidden_states_bytes"] == plan.memory["hidden states"]
    assert found["calibration"]["gathers"] == [kind.name for kind in plan.recipe.needs]
