"""Scores of units, adjusted to the constraints of a model."""

from collections.abc import Mapping, Sequence

import torch

from prunekit.models.units.block_kinds import token_counters
from prunekit.structured.batches import Batch
from prunekit.structured.rankers import Scores
from prunekit.structured.unit_gates import Gates

TRUTH_TOKENS = 512
"""Calibration tokens per unit on which leave-one-out measures the loss."""


def first_tokens(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Return the first samples: at most ``tokens`` tokens, at least one sample."""
    left = max(1, tokens // batches[0]["input_ids"].shape[1])
    few = []
    for batch in batches:
        if left > 0:
            few.append({name: part[:left] for name, part in batch.items()})
            left -= len(batch["input_ids"])
    return few


def raise_scores(scores: Scores, fixed: Mapping[str, Sequence[int]]) -> Scores:
    """Score units that must be kept above all others of their kind.

    Args:
        scores: Score of each unit, by name of its group.
        fixed: Units that must be kept, by name of their group.
    """
    raised = dict(scores)
    for name in scores.keys() & fixed.keys():
        highest = max(float(score.max()) for score in scores.values())
        raised[name] = scores[name].index_fill(0, torch.tensor(fixed[name]), highest + 1)
    return raised


def best_token_counter(gates: Gates, scores: Scores) -> dict[str, list[int]]:
    """Return the block with attention that is always kept, by list.

    It is the best of them; the result is empty for families whose blocks are all alike.
    """
    (group, *others), counters = gates.groups, token_counters(gates.model)
    open_ones = [unit for unit in counters or () if gates.keep[group.name][unit]]
    if others or not open_ones:
        return {}
    return {group.name: [max(open_ones, key=lambda unit: float(scores[group.name][unit]))]}
