"""Compressed weights of a checkpoint: their tensors and their entries in ``config.json``."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.checkpoint.formats import QUANT_METHOD, Format, Parts, WeightLayout, format_named
from prunekit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from prunekit.checkpoint.header import TensorEntry


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

    def check_entries(self, where: object, name: str, files: "Mapping[str, TensorEntry]") -> None:
        """Check existence, types and shapes of the parts by file headers.

        Args:
            where: Folder, for messages.
            name: Name of the weight.
            files: Tensors as stored in the files.

        Raises:
            CheckpointError: A part is missing or has another type or shape.
        """
        if missing := sorted(set(self.parts.values()) - files.keys()):
            raise CheckpointError(f"{where}: lacks {missing[0]}, a part of {name}.")
        entries = {part: files[stored] for part, stored in self.parts.items()}
        if problem := self.format.find_mismatch(entries, self.layout):
            raise _corrupt(f"{entries['weight'].file}: {name}", problem)

    def expand(self, where: str, tensors: Parts, dtype: "torch.dtype | None" = None) -> "Tensor":
        """Return the weight as the model has it, after checking its parts.

        Args:
            where: File and name of the weight, for messages.
            tensors: Stored tensors by name.
            dtype: Type of values or scales before they are expanded; None for theirs.

        Raises:
            CheckpointError: Parts are missing or corrupt.
        """
        parts = {part: tensors[name] for part, name in self.parts.items() if name in tensors}
        check_parts(self.format, where, parts, self.layout)
        if dtype:
            parts[self.format.typed_by] = parts[self.format.typed_by].to(dtype)
        weight = self.format.expand(parts, self.layout.inputs)
        return weight.T.contiguous() if self.layout.transposed else weight


def compressed_weights(folder: Path, storage: dict[str, Any]) -> dict[str, CompressedWeight]:
    """Return the compressed weights that a ``quantization_config`` lists, by name.

    Raises:
        CheckpointError: The entry is invalid.
    """
    try:
        kind = format_named(storage["format"])
        entries = storage["linears"].items()
        layouts = {name: WeightLayout.load(entry, name) for name, entry in entries}
    except (KeyError, TypeError, AttributeError, ConfigError, CheckpointError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: its quantization_config is not one that this version of "
            f"prunekit writes ({error})."
        ) from error
    return {
        f"{name}.weight": _weight_of_layer(kind, name, layout) for name, layout in layouts.items()
    }


def _weight_of_layer(kind: Format, layer: str, layout: WeightLayout) -> CompressedWeight:
    return CompressedWeight(kind, layout, {part: f"{layer}.{part}" for part in kind.parts})


def compress_weight(
    kind: Format, name: str, weight: "Tensor", *, transposed: bool
) -> tuple[dict[str, "Tensor"], WeightLayout | None]:
    """Return the tensors to store for a weight, and its layout.

    A weight that the format cannot store, or not smaller, is stored dense; its layout is None.

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

    Raises:
        CheckpointError: Parts are missing or corrupt.
    """
    if layout:
        return _weight_of_layer(kind, layer_name(name), layout).expand(name, tensors)
    if name not in tensors:
        raise _corrupt(name, "it is missing")
    return tensors[name]


def check_parts(kind: Format, where: str, parts: Parts, layout: WeightLayout) -> None:
    """Check the stored parts of a weight; see :meth:`Format.find_corruption`.

    Args:
        kind: Storage format.
        where: File and name of the weight, for messages.
        parts: Stored tensors by the names of the format.
        layout: Layout of the weight.

    Raises:
        CheckpointError: Parts are missing or corrupt.
    """
    if problem := kind.find_corruption(parts, layout):
        raise _corrupt(where, problem)


def _corrupt(where: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{where}: {problem}. It is corrupt, or another program wrote it.")


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


EXPAND = "PRUNEKIT_EXPAND"
"""Variable that makes transformers and vLLM hold all weights dense: as fast and as large as a dense
checkpoint, from the smaller files."""
DENSE_STORAGE = {"quant_method": QUANT_METHOD, "format": "dense", "linears": {}}
"""``quantization_config`` without compressed weights: makes transformers call prunekit, which
removes units from the model before weights are loaded."""

KEPT_UNITS_KEY = "prunekit_kept"
"""Key of ``config.json`` for the number of units kept at each site, where that differs from the
other entries; for heads with a position bias, the indices of the kept heads."""


def expands() -> bool:
    """Return whether the user wants compressed weights expanded while loading."""
    return os.environ.get(EXPAND, "0") not in ("", "0")
