"""The proof of a run: what transformers cannot open or computes otherwise ends the run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prunekit
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.cli.main import main
from prunekit.errors import CapacityError, CheckpointError
from prunekit.evaluation import proof
from prunekit.evaluation.proof import check_answers, make_proof
from prunekit.models import memory, stock
from tests.support import checkpoints
from tests.support.checkpoints import planned

pytestmark = pytest.mark.usefixtures("no_page")

CPU = torch.device("cpu")


@pytest.fixture
def llama(tmp_path):
    return checkpoints.write(tmp_path / "m")


def test_a_proof_is_the_same_each_time_and_differs_between_models(llama, tmp_path):
    opened = open_checkpoint(llama)
    assert make_proof(opened, CPU) == make_proof(opened, CPU)
    other = open_checkpoint(checkpoints.write(tmp_path / "other"))
    checkpoints.change(other.folder, "model.norm.weight", lambda weight: weight.mul_(3))
    assert make_proof(opened, CPU)["answers"] != make_proof(other, CPU)["answers"]


def spoil_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def spoil_weights(folder):
    checkpoints.configure(folder, transformers_weights="other.safetensors")


SPOILED = {
    spoil_adapter: "it would apply the adapter of adapter_config.json to the weights",
    spoil_weights: "other.safetensors",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_what_transformers_cannot_open_is_no_proof(llama, spoil):
    opened = open_checkpoint(llama)
    spoil(llama)
    with pytest.raises(CheckpointError, match=f"^{llama}: is written, but .*{SPOILED[spoil]}"):
        make_proof(opened, CPU)


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_run_whose_output_cannot_be_opened_ends_with_an_error(llama, tmp_path, spoil, capsys):
    """A file of the output is spoiled as soon as the output is complete."""
    (tmp_path / "c.toml").write_text(
        f'[model]\npath = "{llama}"\ndevice = "cpu"\n[prune]\nmethod = "magnitude"\n'
        f'pattern = "2:4"\n[output]\npath = "{tmp_path / "out"}"\n'
    )
    before = proof.Evaluator

    def evaluator(checkpoint, *arguments):
        spoil(checkpoint.folder)
        return before(checkpoint, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "Evaluator", evaluator)
        assert main(["run", str(tmp_path / "c.toml"), "--quiet"]) == 1
    assert "stock transformers cannot open it: " in capsys.readouterr().err
    assert not (tmp_path / "out/report.json").exists()


def test_a_model_that_transformers_computes_otherwise_is_no_proof(llama, monkeypatch):
    answers = stock.answers
    monkeypatch.setattr(stock, "answers", lambda *given: 1.001 * answers(*given))
    with pytest.raises(CheckpointError, match=r"stock transformers answers within .* \(allowed"):
        make_proof(open_checkpoint(llama), CPU)


def test_a_run_loads_no_more_than_its_limit_into_memory(llama, monkeypatch):
    seen = []
    answers = stock.answers

    def observed(folder, asked, device_map):
        seen.append(device_map)
        return answers(folder, asked, device_map)

    monkeypatch.setattr(stock, "answers", observed)
    checkpoint = open_checkpoint(llama)
    whole = make_proof(checkpoint, CPU)
    monkeypatch.setattr(proof, "LARGEST_IN_MEMORY", checkpoint.nbytes // 2)
    assert make_proof(checkpoint, CPU) == whole
    small, large = seen
    assert small == {}
    assert large["max_memory"] == {"cpu": int(checkpoint.nbytes // 2 / memory.ESTIMATE_MARGIN)}


@pytest.mark.parametrize(
    ("found", "recorded", "said"),
    [
        ([1.0, 2.0], [1.0, 2.0], None),
        ([1.0, 2.0], [1.0, 2.1], "answers within 0.1 of"),
        ([1.0, 2.0], [1.0, 1e38], "answers within 1e"),
        ([1.0, 2.0], [1.0], "gives 2 outputs, the report has 1"),
        ([1.0, 2.0], [], "gives 2 outputs, the report has 0"),
        ([1.0, torch.nan], [1.0, 2.0], "answers within nan"),
        ([1.0, torch.inf], [1.0, torch.inf], "largest output inf"),
        ([0.0, 0.0], [0.0, 0.0], None),
    ],
)
def test_answers_pass_if_they_differ_by_rounding_alone(llama, found, recorded, said):
    recording = {"ids": [[1]], "dtype": "float32", "device": "cpu", "answers": recorded}
    check = check_answers(open_checkpoint(llama), recording, lambda *_: torch.tensor(found))
    assert check.passed == (said is None)
    assert (said or "") in check.detail


@pytest.fixture
def user_site(tmp_path, monkeypatch):
    """A process of a Python whose packages are all in the user site.

    Returns:
        Its module paths.
    """
    interpreter = sys._base_executable  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path / "user"))
    for name in ("PYTHONPATH", "PYTHONNOUSERSITE"):
        monkeypatch.delenv(name, raising=False)
    show = "import json, site, sys; print(json.dumps([site.getusersitepackages(), sys.path]))"
    command = [interpreter, "-P", "-c", show]
    folder = Path(json.loads(subprocess.check_output(command))[0])
    folder.mkdir(parents=True)
    for package in Path(torch.__file__).parents[1].iterdir():
        (folder / package.name).symlink_to(package)
    paths = json.loads(subprocess.check_output(command))[1]
    assert str(folder) in paths
    monkeypatch.setattr(sys, "executable", interpreter)
    return paths


@pytest.mark.soak
def test_a_fresh_process_imports_what_this_one_imports(llama, tmp_path, monkeypatch, user_site):
    """From paths of this process alone, and nothing from where it was started."""
    monkeypatch.chdir(llama)
    (llama / "torch.py").write_text("raise SystemExit('code of the checkpoint')\n")
    extra, witness = tmp_path / "extra", tmp_path / "witness"
    extra.mkdir()
    (extra / "sitecustomize.py").write_text(f"open({str(witness)!r}, 'a').close()\n")
    checkpoint = open_checkpoint(llama)
    recording = make_proof(checkpoint, CPU)
    monkeypatch.setattr(sys, "path", [str(extra), *user_site])
    check = proof.check_recorded_answers(checkpoint, recording)
    assert check.passed, check.detail
    assert witness.exists()


@pytest.mark.parametrize(
    "error", ["OutOfMemoryError: CUDA out of memory.", "RuntimeError: can't allocate memory: 3 GB"]
)
def test_a_fresh_process_without_memory_is_no_failed_check(llama, monkeypatch, error):
    def start(command, **_):
        result = json.loads(command[-1])["result"]
        Path(result).write_text(json.dumps({"error": error}))
        return subprocess.CompletedProcess(command, 0, b"", b"")

    recording = {"ids": [[1]], "dtype": "float32", "device": "cpu", "answers": [0.0]}
    monkeypatch.setattr(subprocess, "run", start)
    with pytest.raises(CapacityError, match="memory"), memory.report_exhausted():
        proof.check_recorded_answers(open_checkpoint(llama), recording)


def test_a_fresh_process_finds_no_modules_where_this_one_was_started(tmp_path, monkeypatch):
    script, home, own = (tmp_path / name for name in ("script", "home", "own"))
    monkeypatch.setattr(sys, "argv", [str(script / "run.py")])
    monkeypatch.setattr(sys, "path", ["", "relative", str(script), str(home), str(own)])
    home.mkdir()
    monkeypatch.chdir(home)
    assert proof._module_path(with_prunekit=False) == str(own)
    first, kernels, last = proof._module_path(with_prunekit=True).split(os.pathsep)
    assert (Path(first, "prunekit/errors.py")).is_file()
    assert (Path(kernels, "prunekit_kernels/__init__.py")).is_file()
    assert last == str(own)


def test_the_fresh_process_gets_no_input_and_its_error_is_shown(llama, monkeypatch):
    seen = {}

    def start(command, **options):
        seen.update(options, command=command)
        return subprocess.CompletedProcess(command, -9, b"", b"Traceback \xff\nOutOfMemory: all\n")

    monkeypatch.setattr(subprocess, "run", start)
    recording = {"ids": [[1]], "dtype": "float32", "device": "cpu", "answers": [0.0]}
    check = proof.check_recorded_answers(open_checkpoint(llama), recording)
    assert check.detail == "stock transformers cannot open it: OutOfMemory: all"
    assert seen["stdin"] == subprocess.DEVNULL
    assert seen["cwd"] == "/"
    assert json.loads(seen["command"][-1])["prunekit"] is False


def test_outputs_of_units_and_of_compressed_weights_are_proven_too(llama, tmp_path):
    layers = {"method": "magnitude", "pattern": "2:4"}
    *_, last = prunekit.run(
        planned(llama, tmp_path / "out", prune=layers, output={"format": "2:4"})
    )
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.compressed
    assert check_answers(checkpoint, last.values["proof"], proof._here(checkpoint.folder)).passed
