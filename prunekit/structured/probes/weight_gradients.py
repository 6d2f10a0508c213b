"""Gradients of the loss with respect to the weights of linears."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.models.in_memory import is_sharded
from prunekit.structured.gated_model import GatedModel


def weight_gradients(gated: GatedModel, linears: Sequence[nn.Module]) -> dict[nn.Module, Tensor]:
    """Return the gradient of the mean loss by each weight.

    The mean runs over all predictions. The gradients are float32 in the stored layout of the
    weight. Frozen weights get one too, and are frozen again afterwards.

    Args:
        gated: The model in eval mode, and its batches.
        linears: Linears whose weights are differentiated.

    Raises:
        ConfigError: The weights are sharded over processes.
    """
    if is_sharded(gated.model):
        raise ConfigError(
            "ranker: FSDP shards the weights over processes, and their gradients cannot be had by "
            "weight. Take a ranker of activations, such as gradient or salience, or use DDP."
        )
    weights = [linear.weight for linear in linears]
    required = [weight.requires_grad for weight in weights]  # pyright: ignore
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]  # pyright: ignore
    count = 0.0
    try:
        for weight in weights:
            weight.requires_grad_(True)  # pyright: ignore  # noqa: FBT003
        for batch in gated.batches:
            gradients, predictions = gated.forward.gradients(batch, lambda: weights)  # pyright: ignore
            for total, gradient in zip(sums, gradients, strict=True):
                total.add_(gradient)
            count += float(predictions.sum())
    finally:
        for weight, before in zip(weights, required, strict=True):
            weight.requires_grad_(before)  # pyright: ignore
    for total in sums:
        gated.ranks.all_reduce_sum(total, "scores")
    count = sum(gated.ranks.all_gather_object(count))
    return {
        linear: total.div_(max(count, 1.0)) for linear, total in zip(linears, sums, strict=True)
    }
