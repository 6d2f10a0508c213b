"""Tensors of compressed-tensors: packing, reading, what is refused."""

import json

import pytest
import torch
from prunekit_kernels import grid_scales, nearest, spread
from safetensors.torch import save_file

from prunekit.checkpoint.packed import (
    expand_tensors,
    pack,
    quantized_tensors,
    storage_config,
    unpack,
)
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import CheckpointError

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPE = (5, 96)


def on_grid(scheme, group=32, dtype=torch.bfloat16):
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    weight[:, ::3] = 0
    scale = grid_scales(weight, scheme, group, dtype)
    return nearest(weight, spread(scale, SHAPE[1]), scheme).to(dtype), scale


def folder(path, tensors, **storage):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    found = storage_config("int4", 32, ["lm_head"]) | storage
    config = {"model_type": "llama", "quantization_config": found}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [8, 9, 31, 64])
def test_words_hold_the_codes_lowest_bits_first(bits, inputs):
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (3, inputs), dtype=torch.int8)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (3, -(-inputs * bits // 32))
    assert torch.equal(unpack(words, bits, inputs), codes)
    first = sum((int(code) - low) << (bits * at) for at, code in enumerate(codes[0, : 32 // bits]))
    assert int(words[0, 0]) & 0xFFFFFFFF == first


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_written_weight_is_read_to_the_bit(scheme, dtype, tmp_path):
    weight, scale = on_grid(scheme, 32 if scheme == "int4" else SHAPE[1], dtype)
    tensors = quantized_tensors(NAME, weight, scale, scheme)
    assert torch.equal(expand_tensors(NAME, tensors, scheme), weight)
    found = open_checkpoint(folder(tmp_path / "m", tensors))
    assert [*found.entries] == [NAME]
    assert found.entry(NAME).dtype == dtype
    assert torch.equal(found.read([NAME])[NAME], weight)


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8"])
def test_the_library_reads_the_same(scheme):
    library = pytest.importorskip("compressed_tensors", reason="compressed-tensors is absent")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weight, scale = on_grid(scheme, 32 if scheme == "int4" else SHAPE[1])
    group = storage_config(scheme, 32 if scheme == "int4" else None, [])["config_groups"]["group_0"]
    held = quantized_tensors(NAME, weight, scale, scheme)
    held = {name.rpartition(".")[2]: tensor for name, tensor in held.items()}
    kind = BaseCompressor.get_value_from_registry(group["format"])
    found = kind.decompress(held, QuantizationScheme.model_validate(group))
    assert torch.equal(found["weight"], weight), library.__version__


def broken(edit):
    weight, scale = on_grid("int4")
    tensors = quantized_tensors(NAME, weight, scale, "int4")
    edit(tensors, NAME.removesuffix(".weight"))
    return tensors


CASES = {
    "not symmetric": (
        lambda held, layer: held.update({f"{layer}.weight_zero_point": torch.zeros(5, 3)}),
        "weight_zero_point says that weights are not symmetric",
    ),
    "no values": (
        lambda held, layer: held.pop(f"{layer}.weight_packed"),
        "weight_scale has no weight of two dimensions beside it",
    ),
    "words of three bits": (
        lambda held, layer: held.update(
            {f"{layer}.weight_packed": torch.zeros(5, 9, dtype=torch.int32)}
        ),
        r"its values are torch.int32 \[5, 9\]",
    ),
    "scales of other groups": (
        lambda held, layer: held.update({f"{layer}.weight_scale": torch.ones(5, 7)}),
        "96 inputs are not 7 groups",
    ),
    "groups that the config does not have": (
        lambda held, layer: held.update({f"{layer}.weight_scale": torch.ones(5, 6)}),
        "a scale for each 16 inputs, and its config.json one for each 32",
    ),
    "scales that are no floats": (
        lambda held, layer: held.update(
            {f"{layer}.weight_scale": torch.ones(5, 3, dtype=torch.int32)}
        ),
        "weight_scale is torch.int32",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_read_is_refused(case, tmp_path):
    edit, message = CASES[case]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder(tmp_path / "m", broken(edit)))


def test_a_config_without_such_tensors_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no tensor is stored so"):
        open_checkpoint(folder(tmp_path / "m", {NAME: torch.ones(2, 2)}))
    with pytest.raises(CheckpointError, match="prunekit migrate"):
        open_checkpoint(folder(tmp_path / "n", {NAME: torch.ones(2, 2)}, sparsity_config={"a": 1}))
