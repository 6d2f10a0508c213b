"""Verification passes for a run's output and fails after changes to it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunekit
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.cli.main import main
from prunekit.errors import CheckpointError, ConfigError
from prunekit.evaluation.verify import recount_zeros, verify
from prunekit.patterns import parse
from tests.support import checkpoints
from tests.support.checkpoints import planned

LINEAR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """Skip the HTML report, which takes time."""
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    checkpoints.write(folder / "m", dtype=torch.bfloat16)
    list(prunekit.run(planned(folder / "m", folder / "out")))
    return folder / "out"


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "out")


def failed_checks(folder):
    return [check.name for check in verify(folder) if not check.passed]


def test_what_a_run_wrote_passes_in_a_process_of_its_own(written, capsys, forked_proof):
    assert main(["verify", str(written)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [
        "passed  files",
        "passed  zeros",
        "passed  pattern",
        "passed  answers",
    ]


TYPES = ["gemma3_text", "gpt2", "gpt_neox", "opt", "bert", "distilbert", "roberta", "t5"]


@pytest.mark.parametrize("model_type", TYPES)
def test_every_family_passes(tmp_path, model_type, proof_in_process):
    folder = checkpoints.write(tmp_path / "m", model_type)
    list(prunekit.run(planned(folder, tmp_path / "out")))
    assert failed_checks(tmp_path / "out") == []


def test_a_zero_that_is_none_any_more_is_counted(copy, proof_in_process):
    def edit(weight):
        row, column = (weight == 0).nonzero()[0].tolist()
        weight[row, column] = 1e-4

    checkpoints.change(copy, LINEAR, edit)
    assert failed_checks(copy)[:3] == ["files", "zeros", "pattern"]


def test_a_broken_group_is_counted_though_the_zeros_are_as_many(copy, proof_in_process):
    def edit(weight):
        weight[0] = weight[0].roll(1)
        weight[0, :4] = torch.tensor([1, 1, 1, 0.0])
        zeros = int((weight == 0).sum()) - weight.numel() // 2
        row = weight[1]
        if zeros < 0:
            row[row.nonzero().flatten()[:-zeros]] = 0
        else:
            row[(row == 0).nonzero().flatten()[:zeros]] = 1e-4

    checkpoints.change(copy, LINEAR, edit)
    assert "zeros" not in failed_checks(copy)
    assert "pattern" in failed_checks(copy)


@pytest.mark.parametrize("name", [LINEAR, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_weight_that_was_changed_gives_other_answers(copy, proof_in_process, name):
    checkpoints.change(copy, name, lambda weight: weight.mul_(1.25))
    assert failed_checks(copy) == ["files", "answers"]


def test_another_zero_is_noticed_though_it_changes_no_answer(copy, proof_in_process):
    """A negative zero differs from zero in one bit."""

    def edit(weight):
        row, column = (weight == 0).nonzero()[0].tolist()
        weight[row, column] = -0.0

    checkpoints.change(copy, LINEAR, edit)
    (check,) = [check for check in verify(copy) if not check.passed]
    assert check.name == "files"
    assert check.detail.endswith("differs from the file of the run")


def test_a_tensor_that_is_gone_is_named(copy, proof_in_process):
    def remove_tensor(name):
        for file in copy.glob("*.safetensors"):
            held = load_file(file)
            if held.pop(name, None) is not None:
                save_file(held, file, metadata={"format": "pt"})

    remove_tensor("model.layers.0.input_layernorm.weight")
    assert "input_layernorm" in [check for check in verify(copy) if not check.passed][-1].detail
    remove_tensor(LINEAR)
    with pytest.raises(CheckpointError, match=rf"{copy}: {LINEAR}, which the report names"):
        verify(copy)


def test_a_file_that_is_cut_off_is_refused(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{file}: "):
        verify(copy)


def test_a_config_that_stock_transformers_cannot_open_fails(copy, proof_in_process):
    checkpoints.configure(copy, architectures=["LlamaForNothing"])
    assert failed_checks(copy) == ["answers"]


def test_a_folder_without_a_report_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no report\.json here"):
        verify(tmp_path)


def test_zeros_are_recounted_from_the_files(written):
    report = json.loads((written / "report.json").read_text())
    found = recount_zeros(open_checkpoint(written), report["layers"], parse("2:4"))
    assert found == {"zeros": report["sparsity"]["zeros"], "violations": 0}
    assert recount_zeros(open_checkpoint(written), report["layers"], parse("1:4"))["violations"] > 0


def change_report(folder, edit):
    file = folder / "report.json"
    report = json.loads(file.read_text())
    edit(report)
    file.write_text(json.dumps(report))


PROOFS = {
    "no answers": {"answers": []},
    "few answers": {"answers": [0.0]},
    "huge answers": {"answers": [3e38] * 512},
    "tokens beyond the vocabulary": {"ids": [[10**9] * 16]},
    "no tokens": {"ids": [[]]},
    "other tokens": {"ids": [[1] * 16]},
    "a coarser type": {"dtype": "float16"},
}


@pytest.mark.parametrize("changes", PROOFS.values(), ids=PROOFS)
def test_a_proof_with_other_contents_does_not_pass(copy, proof_in_process, changes):
    change_report(copy, lambda report: report["proof"].update(changes))
    if changes == {"dtype": "float16"}:
        checkpoints.change(copy, "model.norm.weight", lambda weight: weight.mul_(1.25))
    assert "answers" in failed_checks(copy)


@pytest.mark.parametrize("answer", [1e300, float("nan"), float("inf"), "inf", None])
def test_answers_that_are_no_numbers_are_refused(copy, answer):
    change_report(copy, lambda report: report["proof"]["answers"].insert(0, answer))
    with pytest.raises(CheckpointError, match=r"report.json: proof\.answers\.0: "):
        verify(copy)


def test_a_report_without_a_proof_does_not_pass(copy):
    change_report(copy, lambda report: report.pop("proof"))
    assert failed_checks(copy) == ["answers"]


LAYERS = {
    "an unknown pattern": ({"pattern": "2:x"}, "is not a pattern"),
    "a pattern that does not fit": ({"pattern": "block:7x7"}, "needs outputs and inputs that are"),
    "a huge pattern": ({"pattern": "1:99999999"}, "with 0 < n < m"),
    "a tensor that is a vector": ({"tensor": "model.norm.weight"}, "has shape"),
    "a tensor of another shape": ({"tensor": "model.embed_tokens.weight"}, "has shape"),
    "another orientation": ({"transposed": True, "shape": [1, 2]}, "has shape"),
}


@pytest.mark.parametrize(("changes", "said"), LAYERS.values(), ids=LAYERS)
def test_a_layer_that_the_checkpoint_cannot_have_is_refused(copy, changes, said):
    change_report(copy, lambda report: report["layers"][0].update(changes))
    with pytest.raises(CheckpointError, match=said):
        verify(copy)


def test_an_unknown_pattern_of_the_run_is_refused(copy):
    change_report(copy, lambda report: report["sparsity"].update(pattern="3:"))
    with pytest.raises(CheckpointError, match=r'report.json: "3:" is not a pattern'):
        verify(copy)


def test_the_report_of_a_sweep_is_pointed_to_its_runs(copy, monkeypatch):
    monkeypatch.setattr("prunekit.reports.report.load", lambda folder: {"kind": "sweep"})
    with pytest.raises(ConfigError, match=r"holds a sweep\. Verify the folders"):
        verify(copy)
