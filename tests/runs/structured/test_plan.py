"""The printed plan and the memory estimate of a structured run."""

from prunekit.cli.main import main
from prunekit.config.load import load_config
from prunekit.runs import jobs
from prunekit.runs.structured.plan import owned_parameters
from tests.support.structured import BOTH, planned, write_config


def test_the_plan_says_what_will_go(llama, tmp_path, capsys):
    assert main(["plan", str(write_config(llama, tmp_path / "out", BOTH))]) == 0
    said = capsys.readouterr().out
    assert "50.0 % of heads and neurons, by obs, compared across layers" in said
    assert "operations" in said
    assert "TFLOP" in said
    assert "time: about" in said
    assert "uniform = true makes it one" in " ".join(said.split())
    assert not (tmp_path / "out").exists()


def test_parameters_of_several_groups_are_counted_once(llama, tmp_path):
    plan = planned(llama, tmp_path / "out", BOTH)
    groups = [group for groups in plan.groups.values() for group in groups]
    assert owned_parameters(groups + groups) == owned_parameters(groups) == plan.prunable
    whole = sum(parameter.numel() for parameter in plan.model.parameters())
    assert plan.prunable < whole == plan.parameters


def test_memory_grows_with_a_loss_and_with_training(llama, tmp_path):
    plan = planned(llama, tmp_path / "out", BOTH)
    truth = planned(llama, tmp_path / "out", f"{BOTH}\ntruth = true")
    parts = {"block", "statistics", "activations", "solving", "vocabulary", "hidden states"}
    assert plan.memory.keys() == truth.memory.keys() == parts
    assert plan.memory["block"] < plan.parameters * 4
    assert sum(truth.memory.values()) > sum(plan.memory.values())
    assert truth.memory["hidden states"] > plan.memory["hidden states"]
    path = write_config(llama, tmp_path / "out", BOTH)
    path.write_text(path.read_text() + "[train]\nheld_out = 2\n")
    trained = jobs.plan(load_config(path))
    assert trained.memory["model"] == plan.parameters * 4
    assert trained.memory["training"] == 5 * 4 * plan.parameters - trained.memory["model"]
