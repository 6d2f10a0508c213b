"""Runs that quantize: zeros, report, resuming, what the plan refuses and says."""

import json
from importlib.util import find_spec

import pytest
import torch

from prunekit.checkpoint import adapter
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.cli.main import main
from prunekit.errors import ConfigError
from prunekit.evaluation.verify import verify
from prunekit.runs.sparsify.quantization import quantized_bytes
from prunekit.runs.sparsify.result import sparsity_remarks
from prunekit.runs.sparsify.run import run
from tests.support import checkpoints
from tests.support.checkpoints import planned, run_whole_and_stopped, same_bytes

SPARSEGPT = {"method": "sparsegpt", "pattern": "2:4"}
INSTALLED = find_spec("compressed_tensors") is not None

pytestmark = pytest.mark.usefixtures("no_page")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny model whose linears have 64 inputs."""
    return checkpoints.write(
        tmp_path_factory.mktemp("llama"),
        dtype=torch.bfloat16,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        tie_word_embeddings=True,
    )


def linears(folder):
    checkpoint = open_checkpoint(folder)
    names = [name for name in checkpoint.entries if name.endswith("_proj.weight")]
    return checkpoint.read(names)


def test_a_run_prunes_and_quantizes_and_resumes_to_the_same_bytes(llama, tmp_path):
    sections = {"prune": SPARSEGPT, "output": {"quantize": "int4"}}
    whole, stopped = run_whole_and_stopped(llama, tmp_path, **sections)
    same_bytes(whole, stopped)
    report = json.loads((whole / "report.json").read_text())
    assert report["storage"]["quantized"] == {
        "scheme": "int4",
        "group": 32,
        "words": "int4, a scale for each 32 inputs, mask-aware GPTQ",
        "zeros_before": report["sparsity"]["of"] // 2,
        "refilled": 0,
    }
    assert report["sparsity"]["violations"] == 0
    for layer in report["layers"]:
        assert layer["zeros_pruned"] == layer["shape"][0] * layer["shape"][1] // 2
        assert 0 < layer["relative_error"] < 2 * layer["pruned_error"]
    plan = planned(llama, tmp_path / "p", **sections)
    held = checkpoints.tensors(whole)
    assert plan.written_bytes == sum(value.nbytes for value in held.values())
    passed = {check.name: check.passed for check in verify(whole)}
    assert passed == {"files": True, "zeros": True, "pattern": True, "answers": INSTALLED}


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("data", [True, False])
def test_a_pruned_folder_keeps_every_zero(scheme, data, llama, tmp_path):
    pruned, found = tmp_path / "pruned", tmp_path / "found"
    list(run(planned(llama, pruned, prune=SPARSEGPT)))
    given = ["--data", str(llama / "text.txt"), "--samples", "4", "--length", "12"] if data else []
    command = ["quantize", str(pruned), str(found), "--scheme", scheme, "--quiet", *given]
    assert main([*command, "--device", "cpu"]) == 0
    before, after = linears(pruned), linears(found)
    for name, weight in before.items():
        assert not after[name][weight == 0].any()
        step = {"int4": 0.2, "int8": 0.02, "fp8": 0.08}[scheme]
        difference = (after[name] - weight).float().abs().max()
        assert data or difference <= step * weight.abs().max()
    report = json.loads((found / "report.json").read_text())
    assert report["storage"]["quantized"]["refilled"] == 0
    how = "mask-aware GPTQ" if data else "rounded to nearest"
    assert how in report["storage"]["quantized"]["words"]
    assert main(command) == 2  # the folder is not empty


def test_rows_that_are_no_groups_have_one_scale(llama, tmp_path):
    odd = checkpoints.write(tmp_path / "odd", intermediate_size=40)
    plan = planned(odd, tmp_path / "out", output={"quantize": "int4"})
    assert plan.recipe.quantize.group is None
    assert any("a row has one scale" in note for note in plan.notes)
    even = planned(llama, tmp_path / "out", output={"quantize": "int4"})
    assert even.recipe.quantize.group == 32
    linear = even.linears[0]
    held = quantized_bytes(1000, [linear], {linear.name: torch.bfloat16}, even.recipe.quantize)
    size = linear.size // 2 + linear.size // 32 * 2 + 16
    assert held == 1000 - 2 * linear.size + size


@pytest.mark.parametrize("model", ["gpt2", "mixtral"])
def test_what_engines_do_not_open_is_refused(model, tmp_path):
    folder = checkpoints.write(tmp_path / "m", model)
    with pytest.raises(ConfigError, match="compressed-tensors does not store"):
        planned(folder, tmp_path / "out", output={"quantize": "int8"})


def test_what_only_prunekit_opens_is_refused(llama, tmp_path):
    uneven = checkpoints.write(tmp_path / "uneven")
    checkpoints.configure(uneven, prunekit_kept={"heads": {"model.layers.0.self_attn": [0]}})
    with pytest.raises(ConfigError, match="Prune units with uniform = true, then quantize"):
        planned(uneven, tmp_path / "out", output={"quantize": "int8"})
    adapted = checkpoints.write(tmp_path / "adapted")
    (adapted / adapter.FOLDER).mkdir()
    (adapted / adapter.FOLDER / adapter.FILE).write_bytes(b"")
    with pytest.raises(ConfigError, match="has an adapter beside its weights"):
        planned(adapted, tmp_path / "out", output={"quantize": "int8"})


def test_quantizing_alone_remarks_nothing_of_zeros(llama, tmp_path):
    plan = planned(
        llama,
        tmp_path / "out",
        prune={"pattern": "unstructured", "sparsity": 0.0},
        output={"quantize": "int8"},
    )
    assert not any("prunes nothing" in note for note in plan.notes)
    assert sparsity_remarks(plan, {"zeros": plan.prunable // 2}) == []


def test_a_missing_library_is_said_in_the_plan(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("prunekit.checkpoint.packed.find_spec", lambda _: None)
    plan = planned(llama, tmp_path / "out", output={"quantize": "int8"})
    assert any("compressed-tensors is not installed" in note for note in plan.notes)
