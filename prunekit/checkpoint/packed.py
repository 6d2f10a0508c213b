"""Quantized weights as compressed-tensors stores them, which vLLM and transformers open.

    int4, int8   X.weight_packed   int32 [O, ⌈I · bits / 32⌉], codes + 2^(bits − 1), lowest first
                 X.weight_shape    int64 [2]
    fp8          X.weight          float8_e4m3fn [O, I]
    all          X.weight_scale    [O, G], in the type of the model

Scales are symmetric, so a weight of 0 stays 0. Checked against the library, version 0.20.
Shapes: O output features, I input features, G groups of a row.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from math import ceil
from typing import Any

import torch
from jaxtyping import Float, Int32
from safetensors import safe_open
from torch import Tensor

from prunekit.checkpoint.header import FLOAT_DTYPES, TensorEntry
from prunekit.checkpoint.quantized_weight import QuantizedWeight
from prunekit.errors import CheckpointError

LIBRARY = "compressed-tensors"
"""The library, and its ``quant_method`` in ``config.json``."""
BITS = {"int4": 4, "int8": 8, "fp8": 8}
SCALE = "weight_scale"
PACKED, SHAPE = "weight_packed", "weight_shape"
FOREIGN = ("weight_zero_point", "weight_g_idx", "weight_global_scale")
"""Tensors of what is not read: zeros that are not 0, columns in another order, NVFP4."""


def library_is_installed() -> bool:
    """Return whether transformers can open such checkpoints here."""
    return find_spec(LIBRARY.replace("-", "_")) is not None


def quantized_tensors(
    name: str, weight: Float[Tensor, "O I"], scale: Float[Tensor, "O G"], scheme: str
) -> dict[str, Tensor]:
    """Return the tensors to store for a weight on its grid.

    Args:
        name: Name of the weight; ends in ``.weight``.
        weight: Multiples of the scales, rounded to the type in which the model is stored.
        scale: The scales, which that type holds exactly.
        scheme: "int4", "int8" or "fp8".
    """
    from prunekit_kernels import codes, spread

    layer, wide = name.removesuffix(".weight"), scale.float()
    found = codes(weight.float(), spread(wide, weight.shape[1]), scheme)
    tensors = {f"{layer}.{SCALE}": scale.to(weight.dtype)}
    if scheme == "fp8":
        return {name: found, **tensors}
    shape = torch.tensor(weight.shape)
    return {f"{layer}.{PACKED}": pack(found, BITS[scheme]), f"{layer}.{SHAPE}": shape, **tensors}


def expand_tensors(name: str, tensors: Mapping[str, Tensor], scheme: str) -> Float[Tensor, "O I"]:
    """Return the weight that :func:`quantized_tensors` stores, in the type of its scales."""
    layer = name.removesuffix(".weight")
    scale = tensors[f"{layer}.{SCALE}"]
    if scheme == "fp8":
        return _expand(tensors[name], scale).to(scale.dtype)
    shape = tensors[f"{layer}.{SHAPE}"].tolist()
    packed = tensors[f"{layer}.{PACKED}"]
    return _expand_packed(packed, scale, BITS[scheme], shape[1]).to(scale.dtype)


def pack(found: Tensor, bits: int) -> Int32[Tensor, "O W"]:
    """Return codes of 4 or 8 bits as words of 32 bits."""
    size = 32 // bits
    found = found.to(torch.int16).add_(1 << (bits - 1)).to(torch.uint8)
    found = torch.nn.functional.pad(found, (0, -found.shape[1] % size))
    if bits == 4:
        found = found[:, ::2] | found[:, 1::2] << 4
    return found.contiguous().view(torch.int32)


def unpack(packed: Int32[Tensor, "O W"], bits: int, inputs: int) -> Tensor:
    """Return the int8 codes [O, I] that :func:`pack` packed."""
    found = packed.contiguous().view(torch.uint8)
    if bits == 4:
        found = torch.stack([found & 15, found >> 4], 2).flatten(1)
    return found[:, :inputs].to(torch.int16).sub_(1 << (bits - 1)).to(torch.int8)


def storage_config(scheme: str, group: int | None, ignore: Iterable[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of quantized weights.

    Args:
        scheme: "int4", "int8" or "fp8".
        group: Neighbours that share a scale; None for whole rows.
        ignore: Names of the linear modules that are not quantized.
    """
    kind = "float-quantized" if scheme == "fp8" else "pack-quantized"
    weights = {
        "num_bits": BITS[scheme],
        "type": "float" if scheme == "fp8" else "int",
        "symmetric": True,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
    }
    scheme_of_all = {"targets": ["Linear"], "weights": weights, "format": kind}
    return {
        "quant_method": LIBRARY,
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme_of_all},
        "ignore": sorted(ignore),
    }


def read_quantized(
    storage: Mapping[str, Any], files: Mapping[str, TensorEntry]
) -> dict[str, QuantizedWeight]:
    """Return the quantized weights of a checkpoint, by name.

    Args:
        storage: The ``quantization_config``.
        files: Its tensors.

    Raises:
        CheckpointError: Tensors contradict each other, or are stored in a way that is not read.
    """
    for name, entry in files.items():
        if name.rpartition(".")[2] in FOREIGN:
            raise CheckpointError(
                f"{entry.file}: {name} says that weights are not symmetric multiples of a scale "
                "in their own order. Only those of compressed-tensors are read; start from a "
                "checkpoint in float."
            )
    shapes, found = _shapes(files), dict[str, QuantizedWeight]()
    sizes = _group_sizes(storage)
    for scales in [name for name in files if name.endswith(f".{SCALE}")]:
        layer = scales.removesuffix(f".{SCALE}")
        values, shape = f"{layer}.{PACKED}", shapes.get(layer)
        if values not in files:
            values = f"{layer}.weight"
            shape = files[values].shape if values in files else None
        found[f"{layer}.weight"] = _weight(layer, values, scales, shape, files)
        (_, groups), inputs = files[scales].shape, found[f"{layer}.weight"].shape[1]
        if groups > 1 and inputs // groups not in sizes:
            raise CheckpointError(
                f"{files[scales].file}: {layer} has a scale for each {inputs // groups} inputs, "
                f"and its config.json one for each {', '.join(map(str, sizes)) or 'output'}."
            )
    return found


def _group_sizes(storage: Mapping[str, Any]) -> list[int]:
    """Return the numbers of neighbours that share a scale, as config.json says."""
    schemes = storage.get("config_groups")
    schemes = schemes.values() if isinstance(schemes, dict) else ()
    weights = [each.get("weights") for each in schemes if isinstance(each, dict)]
    sizes = [each.get("group_size") for each in weights if isinstance(each, dict)]
    return [size for size in sizes if isinstance(size, int)]


def _shapes(files: Mapping[str, TensorEntry]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of packed weights, stored as values, by layer."""
    found, by_file = {}, dict[Any, list[str]]()
    for name, entry in files.items():
        if name.endswith(f".{SHAPE}"):
            by_file.setdefault(entry.file, []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name in names:
                shape = opened.get_tensor(name).flatten().tolist()
                found[name.removesuffix(f".{SHAPE}")] = tuple(int(size) for size in shape)
    return found


def _weight(
    layer: str,
    values: str,
    scales: str,
    shape: tuple[int, ...] | None,
    files: Mapping[str, TensorEntry],
) -> QuantizedWeight:
    """Return a weight after checking its tensors by their headers."""
    scale = files[scales]
    where = f"{scale.file}: {layer}"
    if values not in files or shape is None or len(shape) != 2:
        raise CheckpointError(f"{where}: {SCALE} has no weight of two dimensions beside it.")
    stored, (outputs, inputs) = files[values], shape
    groups = scale.shape[1] if len(scale.shape) == 2 else 0
    if scale.dtype not in FLOAT_DTYPES or scale.shape != (outputs, groups) or not groups:
        raise CheckpointError(f"{where}: {SCALE} is {scale.dtype} {list(scale.shape)}.")
    if inputs % groups:
        raise CheckpointError(f"{where}: {inputs} inputs are not {groups} groups of a scale.")
    bits = next(
        (
            bits
            for bits in (4, 8)
            if values.endswith(PACKED)
            and (stored.dtype, stored.shape) == (torch.int32, (outputs, ceil(inputs * bits / 32)))
        ),
        None,
    )
    if bits:
        expand = partial(_expand_packed, bits=bits, inputs=inputs)
        metadata = (f"{layer}.{SHAPE}",)
    elif stored.dtype in (torch.int8, torch.float8_e4m3fn) and stored.shape == shape:
        expand, metadata = _expand, ()
    else:
        raise CheckpointError(
            f"{where}: its values are {stored.dtype} {list(stored.shape)}; a weight of "
            f"{list(shape)} has int8 or e4m3 of that shape, or words of 4 or 8 bits."
        )
    return QuantizedWeight(values, scales, shape, expand, scale.dtype, metadata)


def _expand_packed(values: Tensor, scales: Tensor, bits: int, inputs: int) -> Tensor:
    return _expand(unpack(values, bits, inputs), scales)


def _expand(values: Tensor, scales: Tensor) -> Float[Tensor, "O I"]:
    """Return the products in float32, exact for scales of 16 bits."""
    from prunekit_kernels import spread

    return values.float() * spread(scales.float(), values.shape[1])
