"""2:4 with values of eight bits: to the bit, size, what it cannot store; models that load it."""

import json

import pytest
import torch
from prunekit_kernels import grid_scales, nearest
from transformers import AutoModelForCausalLM

from prunekit.checkpoint.compressed import compress_weight
from prunekit.checkpoint.formats import WeightLayout, format_named
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.cli.main import main
from prunekit.errors import CheckpointError, ConfigError
from prunekit.evaluation.verify import verify
from prunekit.inference.convert import convert
from prunekit.inference.sparse_linear import SparseLinear
from prunekit.runs.sparsify.run import run
from tests.kernels.sparse import two_of_four
from tests.support import checkpoints
from tests.support.checkpoints import planned
from tests.support.formats import DTYPES

FORMAT = format_named("2:4-int8")


def on_grid(outputs, inputs, dtype, shrink=1.0):
    weight = two_of_four(outputs, inputs, empty=0.1).float()
    scale = grid_scales(weight, "int8", inputs, dtype)
    return nearest(weight * shrink, scale, "int8").to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shrink", [1.0, 0.6])
def test_a_rounded_weight_is_stored_to_the_bit(dtype, shrink):
    weight = on_grid(16, 40, dtype, shrink)
    weight[3] = 0
    assert FORMAT.why_not_storable(weight) is None
    parts, layout = compress_weight(FORMAT, "a.weight", weight, transposed=False)
    assert torch.equal(FORMAT.expand({k.split(".")[1]: v for k, v in parts.items()}, 40), weight)
    assert {k: v.dtype for k, v in parts.items()} == {
        "a.weight": torch.int8,
        "a.keep": torch.uint8,
        "a.scale": dtype,
    }
    size = sum(part.nbytes for part in parts.values())
    assert size == 16 * (40 // 2 + 40 // 8 + dtype.itemsize)
    assert layout.value_count == 16 * 20


def test_what_is_not_rounded_stays_dense():
    weight = two_of_four(8, 64, empty=0.0).float()
    reason = FORMAT.why_not_storable(weight)
    assert "8 of 8 rows are no multiples of a scale" in reason
    assert "prunekit quantize --scheme int8" in reason
    assert "more than two" in FORMAT.why_not_storable(torch.ones(2, 8))
    with pytest.raises(ValueError, match="no multiples of one scale"):
        FORMAT.compress(weight)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.inf, torch.nan])
def test_a_scale_that_is_none_is_corrupt(value):
    parts = FORMAT.compress(on_grid(4, 8, torch.float32))
    layout = WeightLayout(4, 8, 16)
    assert FORMAT.find_corruption(parts, layout) is None
    parts["scale"][1] = value
    assert "a scale is not a positive number" in FORMAT.find_corruption(parts, layout)
    parts["scale"] = parts["scale"].int()
    assert "scale has type torch.int32" in FORMAT.find_corruption(parts, layout)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """A model pruned to 2:4 and rounded to int8, without calibration of the rounding."""
    place = tmp_path_factory.mktemp("rounded")
    source = checkpoints.write(place / "m", dtype=torch.bfloat16, num_hidden_layers=2)
    magnitude = {"method": "magnitude", "pattern": "2:4"}
    output = {"quantize": "int8"}
    list(run(planned(source, place / "q", prune=magnitude, output=output, calibration=None)))
    return place / "q"


@pytest.mark.usefixtures("no_page")
def test_a_folder_is_converted_there_and_back_and_loads_as_it_is_stored(rounded, tmp_path):
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    assert main(["convert", str(rounded), str(packed), "--format", "2:4-int8"]) == 0
    convert(packed, dense, "dense")
    source = open_checkpoint(rounded)
    before = source.read(source.entries)
    after = checkpoints.tensors(dense)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(check.passed for check in verify(packed))
    storage = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert (storage["quant_method"], storage["format"]) == ("prunekit", "2:4-int8")
    for dtype in (torch.bfloat16, torch.float32):
        ids = torch.arange(1, 9)[None]
        expected = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)(ids).logits
        model = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype)
        layer = model.model.layers[0].mlp.up_proj
        assert isinstance(layer, SparseLinear)
        assert {part.dtype for part in layer.parts.values()} == {torch.int8, torch.uint8, dtype}
        tolerance = 0 if dtype == torch.bfloat16 else 0.02
        torch.testing.assert_close(model(ids).logits, expected, rtol=tolerance, atol=tolerance)
    with pytest.raises(ConfigError, match="values in the format"):
        layer.set_kept(layer.dense())


def test_a_folder_that_is_not_rounded_is_refused(tmp_path):
    source = checkpoints.write(tmp_path / "m")
    with pytest.raises(CheckpointError, match="nothing in it can be stored as 2:4-int8"):
        convert(source, tmp_path / "out", "2:4-int8")
