"""Memory estimate of a structured run by block."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from prunekit.models.devices import loss_dtype
from prunekit.models.memory import ESTIMATE_MARGIN
from prunekit.models.orientation import weight_matrix
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.hidden_states import Where
from prunekit.models.sequential.pipeline import batch_tokens
from prunekit.models.units.base import UnitGroup
from prunekit.models.units.heads_neurons import LinearUnitGroup
from prunekit.models.vocabulary import output_heads
from prunekit.structured.blockwise.block_passes import HEAD_TOKENS
from prunekit.structured.rankers import Ranker

VECTORS = 12
"""Widest vectors that a block holds of each token while it is differentiated."""


def blockwise_memory(
    stacks: Sequence[StackRunner],
    groups: Iterable[UnitGroup],
    ranker: Ranker,
    samples: tuple[int, int],
    run: tuple[torch.dtype, torch.device],
    *,
    needs_loss: bool = False,
) -> dict[str, int]:
    """Return the peak bytes by use, on the device that runs blocks.

    Args:
        stacks: The stacks of the model without weights.
        groups: Groups of units of all kinds.
        ranker: The ranker.
        samples: Calibration samples of the busiest rank, and tokens of each.
        run: Data type and device of the run.
        needs_loss: The loss is needed, also if the ranker does not need it.
    """
    dtype, device = run
    needs_loss |= any(part.needs_loss for part in ranker.components)
    model, features = stacks[0].model, max(runner.features for runner in stacks)
    blocks = [module for runner in stacks for module in runner.blocks]
    largest = max(sum(each.numel() for each in block.parameters()) for block in blocks)
    widths: dict[int, list[int]] = {}
    for group in groups:
        if isinstance(group, LinearUnitGroup):
            width = weight_matrix(group.reader.linear).shape[1]
            widths.setdefault(id(group.block), []).append(width)
    widest = max((width for each in widths.values() for width in each), default=features)
    (count, length), most = samples, batch_tokens(device)
    tokens, batch = count * length, min(count * length, max(most, length))
    head = max((cast("Tensor", each.weight).numel() for each in output_heads(model)), default=0)
    vocabulary = head // features
    states = (len(blocks) + 3 if needs_loss else 2) * tokens * features * dtype.itemsize
    positions = HEAD_TOKENS * max(1, batch // max(length, 1))
    return {
        "block": largest * dtype.itemsize * (1 + (device.type != "cpu")),
        # Of a block at a time: Gram matrices, gradients of its weights, and the solver.
        "statistics": 4 * max((sum(w**2 for w in each) for each in widths.values()), default=0)
        + 4 * largest * needs_loss
        + 3 * 8 * widest**2,
        "activations": 4 * batch * widest * (VECTORS if needs_loss else 8),
        "vocabulary": needs_loss
        * (head * loss_dtype(dtype, device).itemsize + 3 * 4 * min(positions, batch) * vocabulary),
        "hidden states": states,
    }


def placed(
    memory: Mapping[str, int],
    requested: Where | None,
    device: torch.device,
    available: tuple[int, int],
) -> Where:
    """Return where the hidden states are stored.

    Args:
        memory: From :func:`blockwise_memory`.
        requested: The user's choice; None for the nearest storage with enough free bytes.
        device: Device that runs blocks.
        available: Free bytes of the device and of main memory.
    """
    if requested == "disk" or (requested and device.type != "cpu"):
        return requested
    on_device, in_host = available
    if requested or sum(memory.values()) * ESTIMATE_MARGIN <= on_device:
        return "device"
    fits = device.type != "cpu" and memory["hidden states"] * ESTIMATE_MARGIN <= in_host
    return "host" if fits else "disk"
