"""Compressed weights of a checkpoint: their tensors and their entries in ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.checkpoint.formats import QUANT_METHOD, Format, Parts, WeightLayout, format_named
from prunekit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CompressedWeight:
    """A weight that is stored compressed.

    Attributes:
        format: Storage format.
        layout: Shape and number of stored values.
        parts: Name of the stored tensor, by name of the part in the format.
        metadata: Names of stored tensors that only describe the layout.
    """

    format: Format
    layout: WeightLayout
    parts: dict[str, str]
    metadata: tuple[str, ...] = ()


def compressed_weights(folder: Path, storage: dict[str, Any]) -> dict[str, CompressedWeight]:
    """Return the compressed weights that a ``quantization_config`` lists, by name.

    Raises:
        CheckpointError: The entry is invalid.
    """
    try:
        kind = format_named(storage["format"])
        layouts = {name: _parse_layout(entry) for name, entry in storage["linears"].items()}
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: its quantization_config is not one that this version of "
            f"prunekit writes ({error})."
        ) from error
    return {
        f"{name}.weight": CompressedWeight(
            kind, layout, {part: f"{name}.{part}" for part in kind.parts}
        )
        for name, layout in layouts.items()
    }


def _parse_layout(entry: list[Any]) -> WeightLayout:
    layout = WeightLayout(*entry)
    sizes = (layout.outputs, layout.inputs, layout.value_count)
    if any(type(size) is not int or size < 0 for size in sizes):
        raise TypeError(f"{entry}: sizes must be integers of at least 0")
    return layout


def compress_weight(
    kind: Format, name: str, weight: "Tensor", *, transposed: bool
) -> tuple[dict[str, "Tensor"], WeightLayout | None]:
    """Return the tensors to store for a weight, and its layout.

    A weight that the format cannot store, or not smaller, stays dense; its layout is None.

    Args:
        kind: Storage format.
        name: Name of the weight; ends in ``.weight``.
        weight: The weight as the model has it.
        transposed: The model has it inputs first (Conv1D).
    """
    oriented = weight.T if transposed else weight
    if kind.name == "dense" or kind.why_not_storable(oriented):
        return {name: weight}, None
    parts = kind.compress(oriented)
    layer = layer_name(name)
    outputs, inputs = oriented.shape
    layout = WeightLayout(outputs, inputs, parts["weight"].numel(), transposed)
    return {f"{layer}.{part}": value for part, value in parts.items()}, layout


def expand_weight(kind: Format, name: str, tensors: Parts, layout: WeightLayout | None) -> "Tensor":
    """Return the weight that :func:`compress_weight` compressed.

    Args:
        kind: Storage format.
        name: Name of the weight.
        tensors: Stored tensors by name.
        layout: Layout of the weight; None: it was stored dense.
    """
    if layout is None:
        return tensors[name]
    parts = {part: tensors[f"{layer_name(name)}.{part}"] for part in kind.parts}
    weight = kind.expand(parts, layout.inputs)
    return weight.T.contiguous() if layout.transposed else weight


def layer_name(weight: str) -> str:
    """Return the name of the layer to which a weight belongs."""
    return weight.removesuffix(".weight")


def storage_config(kind: Format, linears: Mapping[str, WeightLayout]) -> dict[str, Any]:
    """Return the ``quantization_config`` of compressed weights, by layer name."""
    return {
        "quant_method": QUANT_METHOD,
        "format": kind.name,
        "linears": {name: layout.dump() for name, layout in sorted(linears.items())},
    }


DENSE_STORAGE = {"quant_method": QUANT_METHOD, "format": "dense", "linears": {}}
"""``quantization_config`` without compressed weights: makes transformers call prunekit, which
removes units from the model before weights are loaded."""

KEPT_UNITS_KEY = "prunekit_kept"
"""Key of ``config.json`` for the number of units kept at each site, where that differs from the
other entries; for heads with a position bias, the indices of the kept heads."""
