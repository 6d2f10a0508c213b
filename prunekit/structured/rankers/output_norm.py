"""Output norm: units that add little to the residual stream go first.

Shapes: T tokens, O outputs of the linear that reads the units, U units, S of its inputs in each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.models.units.heads_neurons import Site


class OutputNorm(Ranker):
    """``E ‖W x‖₂``, mean over tokens of the norm of what a unit gives, W its columns, x its input.

    ``‖W x‖² = xᵀ (WᵀW) x``, so that no output is computed.
    """

    name: ClassVar[str] = "output-norm"

    @override
    def score(self, subject: GatedModel) -> Scores:
        import torch

        from prunekit.structured.probes.reader_inputs import observe_inputs

        products = {site.name: _products(site) for site in subject.sites}
        sums = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in subject.sites}
        tokens = dict.fromkeys(sums, 0)

        def see(site: Site, x: Tensor) -> None:
            columns = site.reader.index.flatten(1).to(x.device)
            parts = x.float()[:, columns]  # [T, U, S]
            squares = torch.einsum("tus,usr,tur->tu", parts, products[site.name], parts)
            sums[site.name] += squares.clamp_min(0).sqrt().double().sum(0).cpu()
            tokens[site.name] += len(x)

        observe_inputs(subject, see)
        subject.add(sums.values())
        counts = subject.total(tokens)
        return {name: total / max(counts[name], 1) for name, total in sums.items()}


def _products(site: Site) -> Tensor:
    """Return WᵀW of each unit, [U, S, S]."""
    import torch

    from prunekit.models.units.heads_neurons import matrix

    weight = matrix(site.reader.linear).detach().float()
    columns = weight[:, site.reader.index.flatten(1).to(weight.device)]  # [O, U, S]
    return torch.einsum("ous,our->usr", columns, columns)
