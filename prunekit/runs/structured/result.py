"""The report of a structured run, with its views of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prunekit.methods import score_statistics
from prunekit.reports.report import UNITS
from prunekit.runs.facts import in_report_order
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.structured.unit_scorer import UnitScorer
from prunekit.structured.batches import Batch
from prunekit.structured.probes.attention_maps import attention_maps, head_output_norms
from prunekit.structured.rankers import Scores
from prunekit.structured.selection import unit_count
from prunekit.structured.unit_gates import Gates

VIEWED_HEADS, VIEWED_TOKENS = 2, 20
"""Heads from either end of the ranking, and tokens, that the report shows one by one."""


def report(
    plan: StructuredPlan, frame: Mapping[str, Any], removal: dict[str, Any]
) -> dict[str, Any]:
    """Return the whole report of a structured run.

    Args:
        plan: The plan of the run.
        frame: The keys that all reports share; see :func:`prunekit.runs.facts.report_frame`.
        removal: The journal entry that was written with the weights.
    """
    own = {
        "kind": UNITS,
        "model": frame["model"] | {"compute_dtype": str(plan.dtype).removeprefix("torch.")},
        "sparsity": sparsity_facts(plan, removal),
        "memory": frame["memory"] | {f"{name}_bytes": value for name, value in plan.memory.items()},
        "notes": [*frame["notes"], removal["note"], *unit_remarks(plan, removal)],
    }
    keys = ("layers", "stock", "views", "training", "agreement")
    return in_report_order({**frame, **own, **{key: removal[key] for key in keys}})


def unit_remarks(plan: StructuredPlan, removal: Mapping[str, Any]) -> list[str]:
    """Return a note for each kind with another count than asked."""
    asked = plan.config.prune.sparsity
    if asked is None:
        return []
    return [
        f"prune.sparsity: {100 * asked:.5g} % of the {kind} were asked for, {gone} of {whole} are "
        f"removed ({100 * gone / whole:.4g} %): numbers that are kept are rounded up, by layer or "
        "to what round_to and transformers ask for."
        for kind, (gone, whole) in sparsity_facts(plan, removal)["removed"].items()
        if gone != unit_count(asked, whole)
    ]


def sparsity_facts(plan: StructuredPlan, removal: Mapping[str, Any]) -> dict[str, Any]:
    """Return the requested sparsity and the removed units and parameters."""
    removed = {
        kind: [
            sum(layer["units"] - len(layer["kept"]) for layer in layers),
            sum(layer["units"] for layer in layers),
        ]
        for kind in plan.config.prune.pattern
        for layers in [[layer for layer in removal["layers"] if layer["kind"] == kind]]
    }
    before, after = removal["parameters"]
    return {
        "target": plan.config.prune.sparsity,
        "budget": plan.config.prune.parameters,
        "achieved": sum(part for part, _ in removed.values())
        / sum(whole for _, whole in removed.values()),
        "pattern": " and ".join(plan.config.prune.pattern),
        "removed": removed,
        "parameters": [before, after],
        "whole_model": 1 - after / before,
    }


def layer_entries(
    gates: Gates,
    scores: Scores,
    entropies: Mapping[str, Sequence[float] | None],
    truth: Scores | None,
) -> dict[str, dict[str, Any]]:
    """Return the report entry of each unit group, by its name.

    Args:
        gates: Gates of one kind of units, closed where a unit is removed.
        scores: Score of each unit in the dense model [U].
        entropies: Normalized attention entropy of each head; empty where it was not measured.
        truth: Rise of the loss without each unit [U]; None where it was not measured.
    """
    kept = gates.kept
    return {
        place.name: {
            "name": place.name,
            "kind": gates.kind,
            "units": place.units,
            "kept": kept[place.name],
            "sparsity": 1 - len(kept[place.name]) / place.units,
            "parameters": place.parameters_per_unit,
            "scores": scores[place.name].tolist(),
            score_statistics.KEY: score_statistics.unit_statistics(scores[place.name]),
            "entropy": entropies.get(place.name),
            **({"truth": truth[place.name].tolist()} if truth else {}),
        }
        for place in gates.groups
    }


def view_heads(
    gates: Gates, scores: Scores, scorer: UnitScorer, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return attention maps of the highest and lowest heads, and head redundancy.

    Args:
        gates: Gates on heads, all open.
        scores: Score of each head [U].
        scorer: Runs the model; the maps show the first tokens of its longest sample.
        tokenizer: Decodes the tokens that the maps show.
    """
    few = _few_tokens(scorer.batches[0])
    ranked = sorted(
        (float(score), site, unit)
        for site in range(len(gates.linear_groups))
        for unit, score in enumerate(scores[gates.linear_groups[site].name])
    )
    ends = [*ranked[:VIEWED_HEADS], *ranked[VIEWED_HEADS:][-VIEWED_HEADS:]]
    chosen = [
        (gates.linear_groups[site], unit * gates.linear_groups[site].reader.index.shape[1])
        for _, site, unit in ends
    ]
    with attention_maps(gates.model, chosen) as maps, head_output_norms(chosen) as norms:
        scorer.run(few)
    redundancy = scorer.redundancy(gates)
    return {
        "tokens": [tokenizer.decode([token]) for token in few["input_ids"][0].tolist()],
        "heads": [
            {
                "layer": site.name,
                "head": head,
                "unit": unit,
                "score": score,
                "attention": rounded(attention),
                "activity": rounded(norm),
            }
            for (site, head), (score, _, unit), attention, norm in zip(
                chosen, ends, maps(), norms(), strict=True
            )
        ],
        "redundancy": {name: rounded(value) for name, value in redundancy.items()},
    }


def _few_tokens(batch: Batch) -> Batch:
    """Return the first tokens of the sample with most tokens."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    sample = int(mask.sum(1).argmax())
    count = min(VIEWED_TOKENS, int(mask[sample].sum()))
    return {
        name: part[sample : sample + 1, :count] for name, part in batch.items() if part.ndim == 2
    }


def mark_kept_heads(views: dict[str, Any], gates: Gates) -> None:
    """Record in place, for each viewed head, whether it is kept."""
    for head in views["heads"]:
        head["kept"] = bool(gates.keep[head["layer"]][head["unit"]])


def rounded(value: Tensor) -> Any:  # noqa: ANN401  nested lists
    """Return a tensor as nested lists, rounded to four decimals for display."""
    return (value.double() * 10**4).round().div(10**4).tolist()
