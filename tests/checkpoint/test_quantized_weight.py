"""Weights in few bits: their entries."""

from pathlib import Path

import torch

from prunekit.checkpoint.header import TensorEntry
from prunekit.checkpoint.quantized_weight import QuantizedWeight


def test_the_entry_is_that_of_the_dense_weight():
    files = {"a.weight_packed": TensorEntry(Path("m"), torch.int32, (4, 2), 32)}
    parts = "a.weight_packed", "a.weight_scale"
    weight = QuantizedWeight(*parts, (4, 16), torch.mul, torch.float16, ("a.weight_shape",))
    assert weight.stored == (*parts, "a.weight_shape")
    entry = weight.entry(files)
    assert (entry.dtype, entry.shape, entry.nbytes) == (torch.float16, (4, 16), 128)
