"""Coordinates of the residual stream in low-rank adapters.

An adapter of a linear that reads the stream has a column of A for each coordinate; one of a linear
that writes it, or of the embeddings, a row of B.
"""

from typing import cast

from torch import nn
from transformers import PreTrainedModel

from prunekit.architectures.adapters import adapter_layers, base_layer
from prunekit.errors import ConfigError
from prunekit.models.adapters import check_low_rank, input_parts, output_parts
from prunekit.models.orientation import stored_axis
from prunekit.models.units.coordinates import CoordinateAxis
from prunekit.models.units.hidden import HiddenGroup


def adapter_axes(model: PreTrainedModel, group: HiddenGroup) -> list[CoordinateAxis]:
    """Return the axes of adapters along the coordinates of a group.

    Args:
        model: The model.
        group: Its coordinates, found without the adapters.

    Raises:
        ConfigError: A module is adapted in another way than by LoRA.
    """
    modules = {axis.module: axis.axis for axis in group.axes if axis.name == "weight"}
    axes = []
    for name, layer in adapter_layers(model).items():
        check_low_rank(layer, name)
        base = base_layer(layer)
        if isinstance(base, nn.Embedding):
            if group.stream.scaled:
                raise ConfigError(
                    f"{name}: this family scales its embeddings by the width, which an adapter of "
                    "them cannot follow. Merge the adapter first."
                )
            factors = cast("nn.ParameterDict", layer.lora_embedding_B)
            axes += [CoordinateAxis(factors, adapter, 0) for adapter in factors]
        elif base in modules:
            reads = modules[base] == stored_axis(base, 1)
            parts = input_parts(layer)[1:] if reads else output_parts(layer)[1:]
            axes += [CoordinateAxis(part, "weight", 1 if reads else 0) for part in parts]
            axes += [CoordinateAxis(part, "bias", 0) for part in parts if part.bias is not None]
    return axes
