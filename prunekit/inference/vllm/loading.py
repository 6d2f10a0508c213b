"""Loading of stored parts of weights into the layers of vLLM.

vLLM hands each stored tensor to the ``weight_loader`` of a parameter, with the place of its layer
in a fused one (``"q"``, 0) but without its name. It detects neither missing tensors of a quantized
model nor, in optimized Python, wrong shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from prunekit.checkpoint.header import FLOAT_DTYPES
from prunekit.errors import CheckpointError
from prunekit.inference.serving import convert_command

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from prunekit.checkpoint.compressed import CompressedWeight

Loader = Callable[..., Any]
QKV = {"q": 0, "k": 1, "v": 2}


class PartLoader:
    """Receives the stored parts of a layer's weights, checked.

    Attributes:
        folder: The checkpoint, for messages.
        weights: Compressed weights by layer name, in the order of the fused layer; None: dense.
        seen: Pairs of layer name and part that were loaded.
    """

    def __init__(self, folder: Path, weights: Mapping[str, CompressedWeight | None]) -> None:
        self.folder, self.weights = folder, weights
        self.seen: set[tuple[str, str]] = set()

    def receive(self, part: str, tensor: Tensor, place: object) -> tuple[str, Tensor]:
        """Check a stored tensor; return its layer's name, and it.

        Args:
            part: Name of the part.
            tensor: The tensor, as vLLM hands it in.
            place: Place in the fused layer as vLLM says it; None if nothing is fused.

        Raises:
            CheckpointError: The tensor has another type or shape than its entry in config.json.
        """
        name = self._layer(place)
        weight = self.weights[name]
        self.seen.add((name, part))
        if weight is None:
            return name, tensor
        if weight.layout.transposed and not tensor.is_contiguous():
            tensor = tensor.t()  # vLLM transposes every weight of a Conv1D, also a compressed one
        with torch.device("meta"):
            expected = weight.format.empty(weight.layout, torch.float32)[part]
        floats = tensor.dtype in FLOAT_DTYPES
        same = floats if part == weight.format.typed_by else tensor.dtype == expected.dtype
        if not same or tensor.shape != expected.shape:
            raise CheckpointError(
                f"{self.folder}: {name}: its {part} is {tensor.dtype} of shape "
                f"{list(tensor.shape)}; a {weight.format.name} weight of "
                f"{list(weight.layout.shape)} needs {list(expected.shape)}. The config belongs to "
                "another model, or the file is corrupt."
            )
        return name, tensor

    def _layer(self, place: object) -> str:
        """Return the name of the layer at a place."""
        names = [*self.weights]
        index = QKV.get(place) if isinstance(place, str) else place
        if index is None and len(names) == 1:
            return names[0]
        if isinstance(index, int) and 0 <= index < len(names):
            return names[index]
        raise CheckpointError(
            f"{self.folder}: vLLM fuses {', '.join(names)} in a way (place {place!r}) that "
            "compressed weights cannot follow. Serve the dense checkpoint: "
            f"{convert_command(self.folder)}"
        )

    def check_complete(self) -> None:
        """Check that all parts of all weights were loaded.

        Raises:
            CheckpointError: A part was not.
        """
        for name, weight in self.weights.items():
            for part in weight.parts if weight else ("weight",):
                if (name, part) not in self.seen:
                    raise CheckpointError(
                        f"{self.folder}: the files have no {name}.{part}. The checkpoint is "
                        "incomplete, or was loaded with --load-format dummy."
                    )
