"""The report of a structured run: contents, HTML page and head views."""

import pytest
import torch

import prunekit
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.cli.main import main
from prunekit.distributed.ranks import SINGLE
from prunekit.models.vocabulary import load_tokenizer
from prunekit.runs.structured import result
from prunekit.runs.structured.unit_scorer import WholeModelScorer
from prunekit.structured.rankers import rankers
from tests.support import checkpoints
from tests.support.structured import BOTH, planned


def test_the_report_says_what_went_and_the_files_are_as_it_says(shrunk, llama):
    folder, report = shrunk
    assert report["kind"] == "units"
    assert report["sparsity"]["removed"] == {"heads": [6, 12], "neurons": [96, 192]}
    before, after = report["sparsity"]["parameters"]
    held = checkpoints.tensors(folder)
    assert sum(value.numel() for value in held.values()) == after < before
    gone = sum(
        layer["parameters"] * (layer["units"] - len(layer["kept"])) for layer in report["layers"]
    )
    assert before - after == gone
    for layer in report["layers"]:
        assert len(layer["scores"]) == layer["units"]
        found = layer["score_statistics"]
        assert found["mean"] == pytest.approx(sum(layer["scores"]) / layer["units"], rel=1e-6)
        assert found["max"] == pytest.approx(max(layer["scores"]), rel=1e-6)
        assert 1 <= len(layer["kept"]) <= layer["units"]
        assert (layer["entropy"] is not None) == (layer["kind"] == "heads")
    assert [layer["name"] for layer in report["layers"]][:2] == [
        "model.layers.0.self_attn",
        "model.layers.0.mlp.down_proj",
    ]
    (judged,) = report["evaluation"]
    assert judged["before"] != judged["after"]
    assert set(report["seconds"]) >= {"calibrate", "prune", "evaluate", "write", "total"}
    dense = checkpoints.tensors(llama)
    assert torch.equal(held["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])


def test_the_page_shows_parameters_heads_and_entropy(shrunk):
    page = (shrunk[0] / "report.html").read_text()
    for said in (
        "6 of 12 heads removed; 96 of 192 neurons removed.",
        "Heads by score",
        "Attention entropy",
        "Attention of block ",
        "Output norms of heads",
        "Redundancy between heads, block ",
        "Framed: the 6 removed heads.",
        "Fraction of units removed",
        "Opens with prunekit.",
        "Scores: mean ± deviation; range",
    ):
        assert said in page, said
    assert "Zeros, counted" not in page
    assert page.count("#d62828") >= 12  # six heads in two maps


def test_report_can_be_written_again_and_list_names_rankers(shrunk, capsys):
    before = (shrunk[0] / "report.html").read_bytes()
    assert main(["report", str(shrunk[0])]) == 0
    assert (shrunk[0] / "report.html").read_bytes() == before
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert "method where pattern is blocks or hidden or experts or heads or neurons" in said
    assert all(f"  {name}" in said for name in rankers())


def test_numbers_of_figures_have_four_decimals():
    value = torch.tensor([[1 / 3, 2.0], [-0.00005, 1e-9]])
    assert result.rounded(value) == [[0.3333, 2.0], [-0.0, 0.0]]


def test_sparsity_is_the_fraction_of_units_over_all_kinds(llama, tmp_path):
    plan = planned(llama, tmp_path / "out", BOTH)
    layers = [
        {"kind": "heads", "units": 4, "kept": [0]},
        {"kind": "heads", "units": 4, "kept": [1, 2, 3]},
        {"kind": "neurons", "units": 8, "kept": [0, 1]},
    ]
    facts = result.sparsity_facts(plan, {"layers": layers, "parameters": [100, 60]})
    assert facts["removed"] == {"heads": [4, 8], "neurons": [6, 8]}
    assert facts["achieved"] == 10 / 16
    assert facts["whole_model"] == pytest.approx(0.4)


def test_views_show_the_heads_at_both_ends_of_the_ranking(llama):
    gates = prunekit.heads(prunekit.load(llama))
    names = [group.name for group in gates.linear_groups]
    scores = {name: torch.arange(4.0) + 4 * place for place, name in enumerate(names)}
    tokenizer = load_tokenizer(open_checkpoint(llama))
    batches = [{"input_ids": torch.arange(4, 14)[None]}]
    scorer = WholeModelScorer(gates.model, batches, batches, SINGLE)
    views = result.view_heads(gates, scores, scorer, tokenizer)
    assert [head["score"] for head in views["heads"]] == [0.0, 1.0, 10.0, 11.0]
    assert [head["layer"] for head in views["heads"]] == [names[0]] * 2 + [names[-1]] * 2
    assert len(views["tokens"]) == 10
    gates.gates[names[0]].keep[0] = False
    result.mark_kept_heads(views, gates)
    assert [head["kept"] for head in views["heads"]] == [False, True, True, True]


def test_numbers_of_units_that_were_rounded_are_remarked(llama, tmp_path):
    plan = planned(llama, tmp_path / "out", 'method = "random"\npattern = "heads"\nsparsity = 0.3')
    layer = {"kind": "heads", "units": 12}
    removal = {"parameters": [10, 9], "layers": [layer | {"kept": [*range(8)]}]}
    assert result.unit_remarks(plan, removal) == []
    removal["layers"] = [layer | {"kept": [*range(9)]}]
    (remark,) = result.unit_remarks(plan, removal)
    assert remark.startswith("prune.sparsity: 30 % of the heads were asked for, 3 of 12 are")
    budget = 'method = "random"\npattern = "heads"\nparameters = 0.9'
    assert result.unit_remarks(planned(llama, tmp_path / "out", budget), removal) == []
