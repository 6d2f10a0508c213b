"""Compressed weights in a checkpoint: their tensors, and what ``config.json`` says of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunekit.checkpoint.formats import METHOD, Format, Parts, Stored, format_named
from prunekit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A weight that a checkpoint holds compressed.

    Attributes:
        format: How.
        stored: What is said of it.
        parts: Where its parts are, by their names in the format; tensors of the files.
        hidden: Other tensors of the files that only say how it is stored.
    """

    format: Format
    stored: Stored
    parts: dict[str, str]
    hidden: tuple[str, ...] = ()


def packed_weights(folder: Path, storage: dict[str, Any]) -> dict[str, Packed]:
    """Return what ``config.json`` says that prunekit compressed."""
    try:
        kind = format_named(storage["format"])
        linears = {name: _stored(entry) for name, entry in storage["linears"].items()}
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: its quantization_config is not one that this version of "
            f"prunekit writes ({error})."
        ) from error
    return {
        f"{name}.weight": Packed(kind, stored, {part: f"{name}.{part}" for part in kind.parts})
        for name, stored in linears.items()
    }


def _stored(entry: list[Any]) -> Stored:
    stored = Stored(*entry)
    sizes = (stored.outputs, stored.inputs, stored.kept)
    if any(type(size) is not int or size < 0 for size in sizes):
        raise TypeError(f"{entry}: sizes are counts")
    return stored


def pack(
    kind: Format, name: str, weight: "Tensor", *, transposed: bool
) -> tuple[dict[str, "Tensor"], Stored | None]:
    """Return what a weight becomes in a file, by name, and what to say of it.

    A weight that the format does not fit stays dense, of which nothing is to be said.

    Args:
        kind: The format.
        name: Of the weight; ends in ``.weight``.
        weight: As the model has it.
        transposed: The model has it inputs first.
    """
    oriented = weight.T if transposed else weight
    if kind.name == "dense" or kind.why_not_storable(oriented):
        return {name: weight}, None
    parts = kind.compress(oriented)
    layer = layer_of(name)
    outputs, inputs = oriented.shape
    stored = Stored(outputs, inputs, parts["weight"].numel(), transposed)
    return {f"{layer}.{part}": value for part, value in parts.items()}, stored


def unpack(kind: Format, name: str, tensors: Parts, stored: Stored | None) -> "Tensor":
    """Return the weight that :func:`pack` packed."""
    if stored is None:
        return tensors[name]
    parts = {part: tensors[f"{layer_of(name)}.{part}"] for part in kind.parts}
    weight = kind.expand(parts, stored.inputs)
    return weight.T.contiguous() if stored.transposed else weight


def layer_of(weight: str) -> str:
    """Return the name of the layer whose weight has this name."""
    return weight.removesuffix(".weight")


def storage_config(kind: Format, linears: Mapping[str, Stored]) -> dict[str, Any]:
    """Return the ``quantization_config`` of weights that were compressed, by name of the layer."""
    return {
        "quant_method": METHOD,
        "format": kind.name,
        "linears": {name: stored.dump() for name, stored in sorted(linears.items())},
    }


OPENS = {"quant_method": METHOD, "format": "dense", "linears": {}}
"""Makes transformers call prunekit before it reads weights into a model that a config describes."""

RECORD = "prunekit_kept"
"""Entry of a config: how many units each site has left, where the config says more; of heads with
a position bias, which."""
