"""Output norm: prune units that add little to the residual stream first.

Shapes: T tokens, O outputs of the linear that reads the units, U units, S of its inputs in each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from typing_extensions import override

from prunekit.models.units.kinds import Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Cost, Ranker

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.models.units.base import UnitGroup
    from prunekit.models.units.heads_neurons import LinearUnitGroup


class OutputNorm(Ranker):
    """``E ‖W x‖₂``: mean norm over tokens of a unit's output.

    W are the columns of the unit and x its input. ``‖W x‖² = xᵀ (WᵀW) x``, so no output is
    computed. Of an expert it is the output times its share, 0 for tokens that are not routed to it.
    """

    name: ClassVar[str] = "output-norm"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"heads", "neurons", "experts"})

    @override
    def score(self, gated: GatedModel) -> Scores:
        import torch

        from prunekit.structured.probes.expert_outputs import expert_sums
        from prunekit.structured.probes.reader_inputs import observe_inputs

        if gated.groups[0].kind == "experts":
            found = expert_sums(gated, outputs=True)
            return {name: sums.outputs / max(sums.tokens, 1) for name, sums in found.items()}
        products = {group.name: _products(group) for group in gated.groups}
        sums = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in gated.groups}
        tokens = dict.fromkeys(sums, 0)

        def observe(group: LinearUnitGroup, x: Tensor) -> None:
            columns = group.reader.index.flatten(1).to(x.device)
            parts = x.float()[:, columns]  # [T, U, S]
            squares = torch.einsum("tus,usr,tur->tu", parts, products[group.name], parts)
            sums[group.name] += squares.clamp_min(0).sqrt().double().sum(0).cpu()
            tokens[group.name] += len(x)

        observe_inputs(gated, observe)
        gated.all_reduce_sums(sums.values())
        counts = gated.all_reduce_counts(tokens)
        return {name: total / max(counts[name], 1) for name, total in sums.items()}

    @override
    def cost(self, group: UnitGroup, length: int) -> Cost:
        from prunekit.models.orientation import features

        if group.kind == "experts":
            return Cost()
        linear = cast("LinearUnitGroup", group)
        outputs, inputs = features(linear.reader.linear)
        each = 2 * inputs * linear.features_per_unit
        held = 4 * inputs * (linear.features_per_unit + outputs)
        return Cost(each, outputs * each, held)


def _products(group: LinearUnitGroup) -> Tensor:
    """Return WᵀW of each unit, [U, S, S]."""
    import torch

    from prunekit.models.adapters import effective_weight

    weight = effective_weight(group.reader.linear).float()
    columns = weight[:, group.reader.index.flatten(1).to(weight.device)]  # [O, U, S]
    return torch.einsum("ous,our->usr", columns, columns)
