"""Ranking of units: steps, budgets and agreement with leave-one-out."""

import pytest
import torch

import prunekit
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.cli.main import main
from prunekit.data.tokens import calibration_tokens
from prunekit.models.vocabulary import load_tokenizer
from prunekit.structured.agreement import spearman
from tests.support import checkpoints
from tests.support.structured import BOTH, finished, planned


def test_the_report_holds_the_ranker_against_the_loss_without_each_unit(llama, tmp_path):
    """The report holds Spearman's ρ to leave-one-out, and a map of both."""
    prune = 'method = "magnitude"\npattern = "heads"\nsparsity = 0.25\ntruth = true'
    report = finished(llama, tmp_path / "out", prune)
    tokenizer = load_tokenizer(open_checkpoint(llama))
    ids = calibration_tokens(tokenizer, [str(llama / "text.txt")], 8, 12, 0).ids
    truth = prunekit.heads(prunekit.load(llama)).score("leave-one-out", ids)
    for layer in report["layers"]:
        torch.testing.assert_close(torch.tensor(layer["truth"]).double(), truth[layer["name"]])
    scores = {layer["name"]: torch.tensor(layer["scores"]) for layer in report["layers"]}
    assert report["agreement"]["heads"] == pytest.approx(spearman(scores, truth), abs=1e-6)
    page = (tmp_path / "out/report.html").read_text()
    assert "Loss without each of the heads" in page
    assert "ρ of both is" in page


def test_one_unit_a_step_is_the_greedy_search(llama, tmp_path, no_page):
    prune = 'method = "obs"\npattern = "heads"\nsparsity = 0.42\nsteps = "each"'
    plan = planned(llama, tmp_path / "out", prune, evaluate=False)
    records = [*prunekit.run(plan)]
    assert sum(record.kind == "step" and "heads" in record.name for record in records) == 5
    kept = {layer["name"]: layer["kept"] for layer in records[-1].values["layers"]}
    tokenizer = load_tokenizer(open_checkpoint(llama))
    ids = calibration_tokens(tokenizer, [str(llama / "text.txt")], 8, 12, 0).ids
    gates = prunekit.heads(prunekit.load(llama))
    for _ in range(5):
        scores = gates.score("obs", ids)
        name, unit = min(
            ((name, unit) for name, keep in gates.kept.items() for unit in keep if len(keep) > 1),
            key=lambda found: float(scores[found[0]][found[1]]),
        )
        gates.gates[name].keep[unit] = False
    assert kept == gates.kept


def test_steps_rank_what_is_left_anew_and_end_at_the_same_count(llama, tmp_path, no_page):
    plan = planned(llama, tmp_path / "out", f"{BOTH}\nsteps = 3")
    records = [*prunekit.run(plan)]
    steps = [record.name for record in records if record.kind == "step"]
    assert steps[:3] == ["35.2 % of heads", "48.1 % of heads", "50.0 % of heads"]
    assert records[-1].values["sparsity"]["removed"]["neurons"] == [96, 192]


@pytest.mark.parametrize("uniform", [False, True])
def test_units_of_all_kinds_go_until_the_budget_is_met(tmp_path, uniform, proof_in_process):
    """All kinds are rescored after each step.

    Parameters are counted in the output file.
    """
    folder = checkpoints.write(tmp_path / "model", num_hidden_layers=3, num_key_value_heads=4)
    prune = (
        'method = "gradient"\npattern = ["heads", "neurons", "hidden", "blocks"]\n'
        f"parameters = 0.6\nsteps = 2\nuniform = {str(uniform).lower()}"
    )
    report = finished(folder, tmp_path / "out", prune)
    before, after = report["sparsity"]["parameters"]
    assert 0.5 * before < after <= 0.6 * before
    assert report["sparsity"]["budget"] == 0.6
    assert report["stock"] >= uniform
    assert all(layer["kept"] for layer in report["layers"])
    held = checkpoints.tensors(tmp_path / "out")
    assert sum(value.numel() for value in held.values()) == after
    assert main(["verify", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "budget 60.0 % of the parameters" in page
