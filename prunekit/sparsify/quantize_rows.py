"""Quantize this rank's rows of a pruned linear, and count its zeros.

Shapes: O output features, I input features, G groups of a row.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from prunekit_kernels import to_host
from torch import Tensor

from prunekit.methods.layer import Layer, Pruned
from prunekit.methods.quantize import Quantization, quantize
from prunekit.sparsify.error import relative_error
from prunekit.sparsify.row_sharding import ShardedLinear


@dataclass(frozen=True)
class QuantizedRows:
    """Rows of a quantized linear.

    Attributes:
        layer: Weight and facts: ``zeros_pruned`` before, ``refilled`` of these that are no zeros
            any more, and ``pruned_error``, the relative error before.
        scale: Scales [O, G] of the rows of all ranks, on the CPU, or pending.
    """

    layer: Pruned
    scale: Float[Tensor, "O G"]


def quantize_rows(
    layer: Layer,
    pruned: Pruned,
    shard: ShardedLinear,
    quantization: Quantization,
    dtype: torch.dtype,
) -> QuantizedRows:
    """Round the weights of a pruned linear as they would be written.

    Args:
        layer: The weight that pruning aimed at, and its statistics.
        pruned: The pruned rows.
        shard: Which rows these are.
        quantization: How they are rounded.
        dtype: Type in which the linear is stored.
    """
    before = pruned.weight.to(dtype).float()
    own = layer.stats.starved != "magnitude"  # else the statistics are none of its inputs
    found = quantize(layer, before, quantization, dtype, compensate=own)
    zero = before == 0
    counts = torch.stack([zero.sum(), (zero & (found.weight != 0)).sum()])
    shard.sharing.all_reduce_sum(counts, "errors")
    zeros, refilled = map(to_host, counts)
    facts: dict[str, Any] = {**pruned.facts, "zeros_pruned": zeros, "refilled": refilled}
    if layer.summarized:
        facts["pruned_error"] = relative_error(layer.weight, before, layer.stats, shard.sharing)
    return QuantizedRows(
        replace(pruned, weight=found.weight, facts=facts),
        to_host(shard.gather(found.scale), lambda scale: scale),
    )
