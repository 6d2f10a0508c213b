"""Weights stored in few bits with scales, read as dense ones.

``fp8`` (DeepSeek): numbers of 8 bits, and a scale for each block of rows and columns. ``mxfp4``
(GPT-OSS): two numbers of 4 bits in a byte, and an exponent of two for each 32 of them. Both are
read as bfloat16. ``compressed-tensors``: see :mod:`prunekit.checkpoint.packed`.

Shapes: E experts, O output features, I input features, G groups of 32 inputs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from prunekit.checkpoint.header import FLOAT_DTYPES, TensorEntry
from prunekit.checkpoint.packed import LIBRARY, read_quantized
from prunekit.checkpoint.quantized_weight import DENSE_DTYPE, QuantizedWeight
from prunekit.errors import CheckpointError

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_DTYPES = (*FLOAT_DTYPES, torch.float8_e8m0fnu, torch.uint8)
FP8_SCALE = "_scale_inv"
"""End of the name of the scales, after that of the weight."""
FP8_UNUSED = ("activation_scale", "input_scale", "activation_scale_inv")
"""Ends of the names of tensors that only the quantized model needs."""
FP4_VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
FP4_GROUP, EXPONENT_BIAS = 32, 127


def quantized_weights(
    folder: Path, storage: Mapping[str, Any], files: Mapping[str, TensorEntry]
) -> dict[str, QuantizedWeight]:
    """Return the quantized weights of a checkpoint, by name.

    Args:
        folder: Folder of the checkpoint.
        storage: The ``quantization_config`` of its ``config.json``.
        files: Its tensors.

    Raises:
        CheckpointError: The method is not known, or tensors contradict it.
    """
    method = storage.get("quant_method")
    if not isinstance(method, str) or method not in METHODS or storage.get("sparsity_config"):
        raise CheckpointError(
            f"{folder / 'config.json'}: has 'quantization_config' with quant_method {method!r}; "
            f"weights of {', '.join(METHODS)} are read. Start from a checkpoint in float. "
            "Sparse weights of compressed-tensors: prunekit migrate makes them dense."
        )
    found = METHODS[method](storage, files)
    if not found:
        raise CheckpointError(
            f"{folder / 'config.json'}: its quantization_config says {method}, but no tensor is "
            "stored so. The config belongs to other files; remove the entry if these are in float."
        )
    return found


def unused_scales(files: Mapping[str, TensorEntry]) -> list[str]:
    """Return the tensors that a dense model has no use for."""
    return [name for name in files if name.rpartition(".")[2] in FP8_UNUSED]


def _fp8(
    storage: Mapping[str, Any], files: Mapping[str, TensorEntry]
) -> dict[str, QuantizedWeight]:
    sizes = storage.get("weight_block_size")
    found: dict[str, QuantizedWeight] = {}
    for name, entry in files.items():
        if entry.dtype not in FP8_DTYPES or entry.unreadable:
            continue
        scales = files.get(f"{name}{FP8_SCALE}")
        if scales is None:
            raise CheckpointError(f"{entry.file}: {name} has no scales {name}{FP8_SCALE}.")
        block = _block(entry.shape, scales.shape, sizes)
        if block is None or scales.dtype not in SCALE_DTYPES:
            raise CheckpointError(
                f"{entry.file}: {name} {list(entry.shape)} has scales {list(scales.shape)} of "
                f"{scales.dtype}, which are not those of blocks {sizes}, weight_block_size of "
                "quantization_config."
            )
        expand = partial(expand_fp8, block=block)
        found[name] = QuantizedWeight(name, f"{name}{FP8_SCALE}", entry.shape, expand)
    return found


def _block(
    weight: tuple[int, ...], scales: tuple[int, ...], sizes: object
) -> tuple[int, int] | None:
    """Return rows and columns that share a scale, or None."""
    if len(weight) < 2:
        return None
    if prod(scales) == 1:
        return weight[-2], weight[-1]
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(isinstance(x, int) for x in sizes):
        return None
    rows, columns = sizes
    if min(rows, columns) < 1:
        return None
    blocks = ceil(weight[-2] / rows), ceil(weight[-1] / columns)
    return (rows, columns) if scales == (*weight[:-2], *blocks) else None


def expand_fp8(
    values: Float[Tensor, "... O I"], scales: Float[Tensor, "..."], block: tuple[int, int]
) -> Float[Tensor, "... O I"]:
    """Return the dense weight: each number times the scale of its block.

    Args:
        values: Numbers of 8 bits.
        scales: One of each block, or a single one; bytes are exponents of two, plus 127.
        block: Rows and columns of a block; the last ones may be smaller.
    """
    factors = scales.float()
    if scales.dtype == torch.uint8:
        factors = torch.exp2(factors - EXPONENT_BIAS)
    if factors.numel() > 1:
        for axis, size in zip((-2, -1), block, strict=True):
            factors = factors.repeat_interleave(size, axis).narrow(axis, 0, values.shape[axis])
    else:
        factors = factors.reshape(())
    return (values.float() * factors).to(DENSE_DTYPE)


def _mxfp4(_: Mapping[str, Any], files: Mapping[str, TensorEntry]) -> dict[str, QuantizedWeight]:
    found: dict[str, QuantizedWeight] = {}
    for name, entry in files.items():
        if not name.endswith("_blocks"):
            continue
        dense = name.removesuffix("_blocks")
        scales, shape = files.get(f"{dense}_scales"), entry.shape
        groups = shape[-1:] == (FP4_GROUP // 2,) and len(shape) == 4
        if scales is None or not groups or scales.shape != shape[:-1]:
            raise CheckpointError(
                f"{entry.file}: {name} {list(shape)} is not [experts, outputs, groups, 16] with "
                f"{dense}_scales of each group beside it, as mxfp4 stores them."
            )
        experts, outputs, count, _bytes = shape
        whole = (experts, count * FP4_GROUP, outputs)
        found[dense] = QuantizedWeight(name, f"{dense}_scales", whole, expand_mxfp4)
    return found


def expand_mxfp4(
    values: UInt8[Tensor, "E O G 16"], scales: UInt8[Tensor, "E O G"]
) -> Float[Tensor, "E I O"]:
    """Return the dense weights: numbers of 4 bits times powers of two.

    Args:
        values: Two numbers a byte, the one of the lower bits first.
        scales: Exponents, plus 127.
    """
    table = torch.tensor(FP4_VALUES, dtype=DENSE_DTYPE, device=values.device)
    numbers = table[torch.stack([values & 15, values >> 4], -1).flatten(-2).int()]
    exponents = scales.int() - EXPONENT_BIAS
    return torch.ldexp(numbers, exponents[..., None]).flatten(-2).transpose(1, 2).contiguous()


METHODS: dict[str, Callable[..., dict[str, QuantizedWeight]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    LIBRARY: read_quantized,
}
"""Functions that find the weights of a method, by ``quant_method``."""
