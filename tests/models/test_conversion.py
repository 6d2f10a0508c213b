"""Tensors that transformers converts on loading are read and written where they are."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from prunekit.checkpoint.parts import find_part, is_whole
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.checkpoint.weight_files import WEIGHTS_FILE
from prunekit.errors import CheckpointError, ConfigError
from prunekit.models.conversion import converted_names
from prunekit.models.empty_model import empty_model
from prunekit.models.weight_names import check_whole_tensors, stored_names
from prunekit.runs.sparsify.run import run
from tests.support import checkpoints
from tests.support.architectures import CONVERTED, tiny
from tests.support.checkpoints import planned

pytestmark = pytest.mark.usefixtures("no_page")

HEADS = {"nomic_bert": AutoModelForMaskedLM, "olmo_hybrid": AutoModelForCausalLM}


@pytest.fixture(params=CONVERTED)
def folder(request, tmp_path):
    return checkpoints.write(tmp_path / "m", request.param)


def test_each_parameter_has_its_values_at_its_name(folder):
    checkpoint = open_checkpoint(folder)
    stored = stored_names(empty_model(checkpoint), checkpoint)
    assert not all(map(is_whole, stored.values()))
    held = load_file(folder / WEIGHTS_FILE)
    for name, weight in tiny(folder_type(folder)).named_parameters():
        assert torch.equal(find_part(held, stored[name]), weight), name
        assert checkpoint.entry(stored[name]).shape == tuple(weight.shape)


def folder_type(folder):
    return open_checkpoint(folder).config["model_type"]


def test_what_is_written_has_the_same_tensors_and_half_of_each_row(folder, tmp_path):
    plan = planned(folder, tmp_path / "out")
    list(run(plan))
    before, after = (checkpoints.tensors(each) for each in (folder, tmp_path / "out"))
    assert {name: value.shape for name, value in before.items()} == {
        name: value.shape for name, value in after.items()
    }
    model = HEADS[folder_type(folder)].from_pretrained(tmp_path / "out")
    for block in plan.blocks:
        for linear in block.pruned:
            zeros = model.get_submodule(linear.name).weight == 0
            assert bool((zeros.sum(1) == linear.inputs // 2).all()), linear.name


def test_parts_of_tensors_are_neither_compressed_nor_trained(tmp_path):
    folder = checkpoints.write(tmp_path / "m", "nomic_bert")
    with pytest.raises(ConfigError, match=r"converts \S+Wqkv\.weight\[0/1, 0:32:1\] on loading to"):
        planned(folder, tmp_path / "out", output={"format": "bitmask"})
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"Wqkv.weight is not all of \S+q_proj.weight"):
        check_whole_tensors(empty_model(checkpoint), checkpoint)


def test_a_tensor_of_which_a_part_is_missing_is_no_join(tmp_path):
    folder = checkpoints.write(tmp_path / "m", "olmo_hybrid")
    held = load_file(folder / WEIGHTS_FILE)
    name = next(name for name in held if name.endswith("k_conv1d.weight"))
    del held[name]
    save_file(held, folder / WEIGHTS_FILE, {"format": "pt"})
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"conv1d\.weight"):
        stored_names(empty_model(checkpoint), checkpoint)


def test_names_that_transformers_keeps_are_those_of_the_model(tmp_path):
    checkpoint = open_checkpoint(checkpoints.write(tmp_path, "llama"))
    found = dict(converted_names(empty_model(checkpoint), checkpoint))
    assert found == {name: name for name in checkpoint.entries}
