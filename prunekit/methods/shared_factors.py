"""Factorizations of Gram matrices, each computed by one rank for all.

A factorization cannot be split over rows, and every rank needs the same one. So each is assigned to
one rank, which computes it while the other ranks compute theirs; it is broadcast when it is needed.
If it fails on that rank, every rank raises the error. All ranks call these functions in the same
order. A single process computes everything itself.

Shapes: I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from jaxtyping import Float

from prunekit.distributed.ranks import Ranks
from prunekit.methods.layer import Layer
from prunekit.statistics import Gram, StageStatistics, lower_panels

if TYPE_CHECKING:
    from prunekit_kernels import Factor
    from torch import Tensor

Upcoming = Callable[[float, int], Sequence[float]]
"""``upcoming(penalty, count)``: up to ``count`` penalties that come next, ``penalty`` first."""
Invert = Callable[[float, "Tensor | None"], "Tensor"]
"""``invert(penalty, spare)``: an inverse [I, I], in the memory of ``spare`` if that is given."""
PANEL = 256
"""Rows of an upper triangle broadcast at once, without the columns that are zero in all of them."""


def precompute_factors(
    layers: Sequence[Layer], key: Hashable, compute: Callable[[Layer], Factor]
) -> None:
    """Assign each layer's factor to a rank; compute this rank's.

    A factor waits in the unused triangle of its Gram matrix until :func:`shared_factor` needs it.

    Args:
        layers: One of each group of layers that share a Gram matrix.
        key: Identifies the factor among all that are computed of one Gram matrix.
        compute: Returns the factor of a layer's Gram matrix.
    """
    layers = [layer for layer in layers if layer.stats.ranks.is_distributed]
    if not layers:
        return
    ranks = layers[0].stats.ranks
    owners = ranks.assign_each([layer.weight.shape[1] ** 3 for layer in layers])
    for layer, owner in zip(layers, owners, strict=True):
        layer.stats.once("owner", lambda owner=owner: owner)
        if owner == ranks.rank:
            # `shared_factor` computes it again, fails again, and then tells all ranks.
            with suppress(ArithmeticError):
                _stash(layer.stats, key, lambda layer=layer: compute(layer))


def shared_factor(
    stats: StageStatistics, key: Hashable, compute: Callable[[], Factor]
) -> tuple[Float[Tensor, "I I"], float]:
    """Return an upper factor and its damping, computed once for all.

    Args:
        stats: Statistics with the Gram matrix, and the ranks that share them.
        key: Identifies the factor among all that are computed of one Gram matrix.
        compute: Returns the factor; called on one rank only.

    Raises:
        ArithmeticError: ``compute`` raised it on the rank that called it; all ranks raise it.
    """

    def share() -> tuple[Float[Tensor, "I I"], float]:
        if stats.ranks.is_distributed:
            return _from_owner(stats, key, compute)
        factor = compute()
        return factor.upper, factor.damping

    return stats.once(("factor", key), share)


def _from_owner(
    stats: StageStatistics, key: Hashable, compute: Callable[[], Factor]
) -> tuple[Float[Tensor, "I I"], float]:
    """Let one rank compute a factor, unless it has, and broadcast it."""
    ranks, gram = stats.ranks, stats[Gram]
    owner = stats.once("owner", lambda: ranks.assign(len(gram.total) ** 3))
    damping = ranks.run_on_main(lambda: _stash(stats, key, compute), owner)
    stashed = gram.pop_upper()
    upper = gram.total.new_zeros(gram.total.shape) if stashed is None else stashed
    rows = range(0, len(upper), PANEL)
    ranks.broadcast(owner, (upper[row : row + PANEL, row:] for row in rows), "inverses")
    return upper, damping


def _stash(stats: StageStatistics, key: Hashable, compute: Callable[[], Factor]) -> float:
    """Compute a factor, stash it in its Gram matrix, return its damping."""

    def stash() -> float:
        factor = compute()
        stats[Gram].stash_upper(factor.upper)
        return factor.damping

    return stats.once(("stashed factor", key), stash)


def shared_inverses(
    invert: Invert, gram: Float[Tensor, "I I"], upcoming: Upcoming, ranks: Ranks
) -> Invert:
    """Return ``invert`` with each inverse computed by one rank.

    Args:
        invert: Computes an inverse. It may write to its second argument.
        gram: The matrix that is inverted for each penalty, both triangles.
        upcoming: Foretells penalties, so that ranks compute the next inverses at the same time.
        ranks: The ranks that share the inverses.
    """
    return SharedInverses(invert, gram, upcoming, ranks) if ranks.is_distributed else invert


class SharedInverses:
    """Inverses for a sequence of penalties, each computed by one rank.

    A round is as many upcoming penalties as there are ranks. When it begins, each rank computes one
    inverse of it; each is broadcast when it is needed. So a rank holds two inverses: its own and
    the one in use. If another penalty is needed than was foretold, the rest of the round is
    dropped and a new one begins.

    Arguments are those of :func:`shared_inverses`.
    """

    def __init__(
        self, invert: Invert, gram: Float[Tensor, "I I"], upcoming: Upcoming, ranks: Ranks
    ) -> None:
        self._invert, self._gram, self._upcoming, self._ranks = invert, gram, upcoming, ranks
        self._round: list[tuple[float, int]] = []  # penalties, and the rank that inverts for each
        self._own: Tensor | None = None

    def __call__(self, penalty: float, spare: Float[Tensor, "I I"] | None) -> Float[Tensor, "I I"]:
        """Return the inverse for a penalty; one from another rank overwrites ``spare``.

        Raises:
            ArithmeticError: The inversion failed on its rank; all ranks raise it.
        """
        import torch
        from prunekit_kernels import mirror

        ranks = self._ranks
        if not self._round or self._round[0][0] != penalty:
            self._begin_round(penalty)
        _, owner = self._round.pop(0)
        ranks.run_on_main(lambda: self._compute(penalty), owner)
        if owner == ranks.rank:
            inverse, self._own = self._own, None
        else:
            inverse = spare
        inverse = torch.empty_like(self._gram) if inverse is None else inverse
        ranks.broadcast(owner, lower_panels(inverse), "inverses")
        return mirror(inverse)

    def _begin_round(self, penalty: float) -> None:
        self._own = None
        penalties = self._upcoming(penalty, self._ranks.size)
        owners = self._ranks.assign_rounds(len(self._gram) ** 3, len(penalties))
        self._round = [*zip(penalties, owners, strict=True)]
        for upcoming, owner in self._round:
            if owner == self._ranks.rank:
                # It fails again when it is needed, and then all ranks are told.
                with suppress(ArithmeticError):
                    self._compute(upcoming)

    def _compute(self, penalty: float) -> None:
        if self._own is None:
            self._own = self._invert(penalty, None)
