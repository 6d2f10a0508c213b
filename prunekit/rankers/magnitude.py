"""Magnitude: units with small weights go first."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from prunekit.rankers.base import Ranker, Scores, Subject


class UnitMagnitude(Ranker):
    """``‖Q‖ + ‖K‖ + ‖V‖ + ‖O‖`` of a head, ``‖gate‖ + ‖up‖ + ‖down‖`` of a neuron (Frobenius).

    Of heads that share a key head, the norms of each one's queries and outputs are added.
    """

    name: ClassVar[str] = "magnitude"
    needs_data: ClassVar[bool] = False

    @override
    def score(self, subject: Subject) -> Scores:
        from prunekit.sites import matrix

        scores = {}
        for site in subject.sites:
            read = matrix(site.reader.linear).detach().T
            parts = [(read, site.reader.index)]
            parts += [(matrix(part.linear).detach(), part.index) for part in site.writers]
            # The norm of some rows is that of the norms of each.
            norms = [
                rows.double().norm(dim=1).cpu()[index].norm(dim=2).sum(1) for rows, index in parts
            ]
            scores[site.name] = sum(norms)
        return scores
