"""A structured run journals its removal once, and lists modules in the model's order."""

import prunekit
from prunekit.runs.structured import unit_run
from prunekit.runs.structured.ranking import UnitRanking
from tests.support.structured import planned

HEADS = 'method = "magnitude"\npattern = "heads"\nsparsity = 0.5'


def test_names_are_in_the_order_of_the_model_not_of_the_alphabet(llama):
    model = prunekit.load(llama)
    names = [name for name, _ in model.named_modules() if "self_attn" in name or "mlp" in name]
    assert sorted(names) != names
    assert unit_run.run_order(model, sorted(names)) == names


def test_units_that_were_ranked_before_a_stop_are_not_ranked_again(
    llama, tmp_path, monkeypatch, proof_in_process
):
    plan = planned(llama, tmp_path / "out", HEADS, evaluate=False)
    records = prunekit.run(plan)
    for record in records:
        if (record.kind, record.name) == ("phase", "write"):
            break
    records.close()
    monkeypatch.setattr(UnitRanking, "rank", None)
    *_, last = prunekit.run(plan, resume=True)
    assert last.kind == "finish"
