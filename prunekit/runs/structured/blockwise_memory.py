"""Memory estimate of a structured run by block."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from prunekit.models.devices import loss_dtype
from prunekit.models.memory import ESTIMATE_MARGIN
from prunekit.models.orientation import features
from prunekit.models.sequential.cached_module import MAX_INPUT_WIDTH
from prunekit.models.sequential.hidden_states import Where
from prunekit.models.vocabulary import input_embeddings, output_heads
from prunekit.runs.structured.work_estimate import CostInputs
from prunekit.statistics import Gram
from prunekit.structured.blockwise.block_forward import VARIANTS
from prunekit.structured.blockwise.block_passes import HEAD_TOKENS
from prunekit.structured.finalize import linear_groups_of
from prunekit.structured.rankers import Ranker, rankers
from prunekit.structured.refit import refit_bytes

VECTORS = 12
"""Widest vectors that a block holds of each token while it is differentiated."""
OBSERVED_VECTORS = 5
"""Those while its inputs are observed."""


class Place(NamedTuple):
    """Bytes of a run by their place."""

    device: int
    host: int
    disk: int


def blockwise_memory(given: CostInputs, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Return the peak bytes by use.

    Scores and refits are solved in main memory: on a GPU those bytes are apart.

    Args:
        given: The model, its units and the samples.
        dtype: Data type of the run.
        device: Device that runs blocks.
    """
    parts = [*given.prune.method.components]
    if given.prune.truth:
        parts.append(rankers()["leave-one-out"]())
    needs_loss = any(part.needs_loss for part in parts)
    on_cpu = device.type == "cpu"
    blocks = [module for runner in given.stacks for module in runner.blocks]
    largest = max(sum(each.numel() for each in block.parameters()) for block in blocks)
    activations = _activations(given, needs_loss=needs_loss)
    phases = [
        (0, 0),
        *(each for block in blocks for each in _statistics(given, parts, block, on_cpu=on_cpu)),
    ]
    if on_cpu:  # activations and solving follow each other
        held, solving = max(phases, key=lambda each: each[0] + max(each[1], activations))
        solving, activations = (
            solving * (solving >= activations),
            activations * (activations > solving),
        )
    else:
        held, solving = map(max, zip(*phases, strict=True))
    memory = {
        "block": largest * dtype.itemsize * (1 + (not on_cpu)),
        "statistics": held,
        "activations": activations,
        "solving": solving,
        "vocabulary": _vocabulary(given, dtype, device, needs_loss=needs_loss),
        "hidden states": _hidden_states(given, parts, blocks) * dtype.itemsize,
    }
    # Embeddings and head are loaded before anything is gathered.
    gathered = ["statistics", "activations", *(["solving"] if on_cpu else [])]
    before = memory["vocabulary"] > sum(memory[name] for name in gathered)
    return memory | dict.fromkeys(gathered if before else ["vocabulary"], 0)


def _statistics(
    given: CostInputs, parts: list[Ranker], block: nn.Module, *, on_cpu: bool
) -> Iterator[tuple[int, int]]:
    """Yield the bytes of statistics in a block, and of solving."""
    length = given.samples[1]
    for kind, groups in given.groups.items():
        inside = [group for group in groups if group.is_in(block)]
        for part in parts if inside else ():
            costs = [part.cost(group, length) for group in inside]
            solving = max(each.solving for each in costs)
            if part.by_weights:
                weights = {each for group in linear_groups_of(inside) for each in group.linears}
                sizes = [cast("Tensor", each.weight).numel() for each in weights]
                # Sums and a batch's gradients in float32; products of a matrix in float64.
                yield 8 * sum(sizes), solving + 4 * 8 * max(sizes, default=0)
            yield sum(each.held for each in costs), solving
        for group in linear_groups_of(inside):
            width = features(group.reader.linear)[1]
            if kind == "heads" and given.samples[0]:  # their similarities, for the report
                yield Gram.nbytes(width), 2 * 8 * width**2
            if given.prune.compensate == "refit":
                copied = 0 if on_cpu else Gram.nbytes(width)  # H in main memory
                yield Gram.nbytes(width), refit_bytes(group, given.most_kept) + copied


def _activations(given: CostInputs, *, needs_loss: bool) -> int:
    """Return the bytes of intermediate activations of a batch in a block."""
    count, length = given.samples
    tokens = min(count * length, max(given.batch, length))
    widths = [runner.features for runner in given.stacks]
    for groups in given.groups.values():
        widths += [features(group.reader.linear)[1] for group in linear_groups_of(groups)]
    return 4 * tokens * max(widths) * (VECTORS if needs_loss else OBSERVED_VECTORS)


def _vocabulary(
    given: CostInputs, dtype: torch.dtype, device: torch.device, *, needs_loss: bool
) -> int:
    """Return the bytes of the embeddings, or of head and logits."""
    count, length = given.samples
    if not count:
        return 0
    model = given.stacks[0].model
    tables = input_embeddings(model, [runner.module for runner in given.stacks])
    embeddings = max((cast("Tensor", each.weight).numel() for each in tables), default=0)
    heads = output_heads(model) if needs_loss else []
    head = max((cast("Tensor", each.weight).numel() for each in heads), default=0)
    batch = min(count, max(1, given.batch // max(length, 1)))
    positions = batch * min(HEAD_TOKENS, length)
    logits = 3 * 4 * positions * head // given.stacks[-1].features
    loss_bytes = head * loss_dtype(dtype, device).itemsize + logits
    return max(embeddings * dtype.itemsize, loss_bytes)


def _hidden_states(given: CostInputs, parts: list[Ranker], blocks: list[nn.Module]) -> int:
    """Return the numbers that hidden states of all samples have."""
    count, length = given.samples
    width = max(runner.features for runner in given.stacks)
    features_of_token = 2 * width
    if any(part.needs_loss for part in parts):
        # The input of each block, the output of the last, and gradients by two of them.
        features_of_token = (len(blocks) + 3) * width
    if any(part.compares_losses for part in given.prune.method.components):
        features_of_token += VARIANTS * width
    if given.prune.compensate == "refit":
        features_of_token = max(features_of_token, width + _cached_features(given, width))
    return count * length * features_of_token


def _cached_features(given: CostInputs, width: int) -> int:
    """Return the cached features of a token during a refit."""
    widest = [
        max(features(group.reader.linear)[1] for group in groups)
        for each in given.groups.values()
        if (groups := linear_groups_of(each))
    ]
    # The input of a reader if it is not too wide, else the output of its module.
    return sum(each if each <= MAX_INPUT_WIDTH * width else width for each in widest)


def by_place(memory: Mapping[str, int], where: Where, device: torch.device) -> Place:
    """Return the bytes on the device, in main memory and on disk.

    A CPU runs them in main memory, which then is the device.

    Args:
        memory: From :func:`blockwise_memory`.
        where: Where the hidden states are stored.
        device: Device that runs blocks.
    """
    apart: dict[str, str] = {"hidden states": where}
    if device.type != "cpu":
        apart["solving"] = "host"
    sums = {"device": 0, "host": 0, "disk": 0}
    for name, nbytes in memory.items():
        sums[apart.get(name, "device")] += nbytes
    return Place(**sums)


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
    if requested or by_place(memory, "device", device).device * ESTIMATE_MARGIN <= on_device:
        return "device"
    host = by_place(memory, "host", device).host
    fits = device.type != "cpu" and host * ESTIMATE_MARGIN <= in_host
    return "host" if fits else "disk"
