"""Weights in few bits are read as bfloat16, a block at a time, and written so."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from prunekit.checkpoint.quantized import FP8_SCALE, expand_fp8, expand_mxfp4
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.checkpoint.weight_files import WEIGHTS_FILE
from prunekit.errors import CheckpointError
from prunekit.models.load import load
from prunekit.runs.sparsify.run import run
from tests.support import checkpoints
from tests.support.checkpoints import planned

pytestmark = pytest.mark.usefixtures("no_page")

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 24], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def quantize(weight, rows=16, columns=24):
    """Return numbers of 8 bits and scales of each block, the last of which may be smaller."""
    counts = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    values, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(counts)
    for i in range(counts[0]):
        for j in range(counts[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[part].abs().max() / 448
            values[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


@pytest.fixture
def fp8(tmp_path):
    """The tiny Llama with its linears in 8 bits."""
    folder = checkpoints.write(tmp_path / "fp8", dtype=torch.bfloat16)
    held = load_file(folder / WEIGHTS_FILE)
    for name in [name for name in held if "_proj" in name]:
        held[name], held[f"{name}{FP8_SCALE}"] = quantize(held[name].float())
    held["model.layers.0.mlp.down_proj.activation_scale"] = torch.ones(1)
    save_file(held, folder / WEIGHTS_FILE, {"format": "pt"})
    checkpoints.configure(folder, quantization_config=FP8)
    return folder


@pytest.fixture
def mxfp4(tmp_path):
    """A tiny GPT-OSS with its experts in 4 bits."""
    folder = checkpoints.write(
        tmp_path / "mxfp4", "gpt_oss", torch.bfloat16, hidden_size=32, intermediate_size=32
    )
    held = load_file(folder / WEIGHTS_FILE)
    for name in [name for name in held if name.endswith("experts.gate_up_proj")]:
        outputs = held[name].shape[2]
        held[f"{name}_blocks"] = torch.randint(0, 256, (4, outputs, 1, 16), dtype=torch.uint8)
        held[f"{name}_scales"] = torch.randint(120, 128, (4, outputs, 1), dtype=torch.uint8)
        del held[name]
    save_file(held, folder / WEIGHTS_FILE, {"format": "pt"})
    checkpoints.configure(folder, quantization_config=MXFP4)
    return folder


def test_the_last_blocks_may_be_smaller():
    weight = torch.randn(40, 50)
    values, scales = quantize(weight)
    found = expand_fp8(values, scales, (16, 24))
    expected = values.float()
    for i in range(40):
        for j in range(50):
            expected[i, j] *= scales[i // 16, j // 24]
    assert torch.equal(found, expected.bfloat16())
    torch.testing.assert_close(found.float(), weight, rtol=0.07, atol=0.02)
    bytes_ = torch.full((3, 3), 128, dtype=torch.uint8)
    assert torch.equal(expand_fp8(values, bytes_, (16, 24)), (values.float() * 2).bfloat16())
    single = expand_fp8(values, torch.tensor([2.0]), (40, 50))
    assert torch.equal(single, (values.float() * 2).bfloat16())


def test_numbers_of_four_bits_are_those_of_transformers():
    values = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, 6, 3), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(values, scales)
    assert torch.equal(expand_mxfp4(values, scales), expected)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_a_run_writes_what_was_read_in_bfloat16_without_the_rest(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    dense = load(folder)
    assert dense.dtype == torch.bfloat16
    plan = planned(folder, tmp_path / "out", prune={"method": "magnitude"})
    assert any(f"{len(plan.checkpoint.quantized)} weights are" in note for note in plan.notes)
    list(run(plan))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, info = opened
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    before = dict(dense.named_parameters())
    for name, weight in model.named_parameters():
        kept = weight != 0
        assert torch.equal(weight[kept], before[name][kept]), name


@pytest.mark.parametrize("method", ["awq", None, ["fp8"], 3], ids=str)
def test_a_method_that_is_not_known_is_refused_with_the_way_out(tmp_path, method):
    folder = checkpoints.write(tmp_path)
    checkpoints.configure(folder, quantization_config={"quant_method": method})
    with pytest.raises(
        CheckpointError, match=r"quant_method .*; weights of fp8, mxfp4, compressed"
    ):
        open_checkpoint(folder)


def test_files_in_float_that_the_config_calls_quantized_are_refused(tmp_path):
    folder = checkpoints.write(tmp_path)
    checkpoints.configure(folder, quantization_config=FP8)
    with pytest.raises(CheckpointError, match="says fp8, but no tensor is stored so"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda held, scale: held.pop(scale), "has no scales"),
        (lambda held, scale: held.update({scale: torch.ones(3, 3)}), r"not those of blocks \[16,"),
        (lambda held, scale: held.update({scale: held[scale].long()}), "of torch.int64, which are"),
    ],
)
def test_scales_that_do_not_fit_are_refused(fp8, spoil, message):
    held = load_file(fp8 / WEIGHTS_FILE)
    spoil(held, f"model.layers.0.mlp.down_proj.weight{FP8_SCALE}")
    save_file(held, fp8 / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(fp8)


@pytest.mark.parametrize("sizes", [None, [16], [0, 24], "16", [16.0, 24]])
def test_sizes_of_blocks_that_are_none_are_refused(fp8, sizes):
    checkpoints.configure(fp8, quantization_config=FP8 | {"weight_block_size": sizes})
    with pytest.raises(CheckpointError, match="not those of blocks"):
        open_checkpoint(fp8)


def test_groups_of_another_size_are_refused(mxfp4):
    held = load_file(mxfp4 / WEIGHTS_FILE)
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    held[name] = held[name][..., :8].contiguous()
    save_file(held, mxfp4 / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"is not \[experts, outputs, groups, 16\]"):
        open_checkpoint(mxfp4)
