"""ADMM: search for the mask and the weights at the same time.

Of a weight W and the Gram matrix G of its inputs, in the letters of ALPS (Meng et al.,
arXiv:2406.07831), scaled so that A has a unit diagonal and |B| is Wanda's score:

    s = √diag(G + λI),  A = (G + λI) / (s sᵀ),  B = W ∘ s,  D = P(B),  U = 0
    for each penalty ρ, rising:
        X = B + ρ (D − U − B)(A + ρI)⁻¹
        D = P(X + U),  U = X + U − D          P projects onto the pattern
    W += (D − B) / s on the mask of D, then conjugate gradients on that mask

The loop is :func:`prunekit_kernels.admm`.

Shapes: O output features of all stacked layers, I input features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from pydantic import Field
from typing_extensions import override

from prunekit.distributed.ranks import Ranks
from prunekit.errors import NumericsError
from prunekit.methods.base import MAX_STACKED_ROWS, Stacked
from prunekit.methods.layer import Layer, Pruned
from prunekit.methods.projection import Projection, row_counts
from prunekit.methods.refine import effective_damping, refine
from prunekit.methods.shared_factors import Invert, Upcoming, shared_inverses
from prunekit.methods.target import Target
from prunekit.patterns import WeightScope
from prunekit.statistics import Gram, Statistic

if TYPE_CHECKING:
    from torch import Tensor

Inverses = dict[float, "Tensor"]
"""(A + ρI)⁻¹ by ρ."""
STAGES = 7
"""Distinct penalties, about three iterations each; more err alike and cost an inverse each."""


class Admm(Stacked):
    """ADMM with a rising penalty, then conjugate gradients on its mask.

    The problem is that of ALPS (Meng et al., arXiv:2406.07831); the penalty rises geometrically.
    Where inputs share one direction, such as a large mean, they are scaled by optimal brain
    surgeon's score instead of Wanda's.
    """

    name: ClassVar[str] = "admm"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})
    scope: ClassVar[WeightScope] = "layer"
    target: ClassVar[Target] = "dense"
    copies: ClassVar[float] = 8
    squares: ClassVar[int] = 1
    shared_inverses: ClassVar[bool] = True

    damping: float = Field(default=0.001, ge=0, le=1)
    """Least value added to the Gram matrix's diagonal, as a fraction of its mean; with few tokens
    it is half of the inputs per token instead, up to 1."""
    iterations: int = Field(default=20, ge=1, le=100_000)
    """Iterations of ADMM, a matrix product each; 60 err 1 % less."""
    first_penalty: float = Field(default=0.15, gt=0)
    """Weight of the constraint at the start, as a fraction of the Gram matrix's mean diagonal."""
    last_penalty: float = Field(default=1.0, gt=0)
    """Weight of the constraint in the last iterations."""
    refine_iterations: int = Field(default=6, ge=0, le=100_000)
    """Iterations of conjugate gradients at the end, a matrix product each."""

    @override
    def prune_together(self, layers: Sequence[Layer]) -> list[Pruned]:
        """Prune narrow layers stacked, wide ones by the same inverses."""
        if not _share_inverses([layer.outputs for layer in layers]):
            return super().prune_together(layers)
        kept = Inverses()
        return [self._solve([layer], kept)[0] for layer in layers]

    @override
    def _solve(self, layers: Sequence[Layer], kept: Inverses | None = None) -> list[Pruned]:
        """Prune layers that share a Gram matrix, stacked one above the other.

        Args:
            layers: The layers.
            kept: Inverses for other layers with this Gram matrix, which gets those computed.
        """
        penalties = self._penalties()
        distinct = [*dict.fromkeys(penalties)]

        def upcoming(penalty: float, count: int) -> list[float]:
            return distinct[distinct.index(penalty) :][:count]

        damping = effective_damping(layers[0].stats[Gram], self.damping)
        solved = solve_admm(
            layers, damping, Projection(layers), penalties, upcoming, choose_scale=True, kept=kept
        )
        return [
            refine(layer, pruned, damping, self.refine_iterations)
            for layer, pruned in zip(layers, solved, strict=True)
        ]

    def _penalties(self) -> list[float]:
        """Return ρ of each iteration: ``STAGES`` values in geometric progression."""
        stages = min(STAGES, self.iterations)
        ratio = (self.last_penalty / self.first_penalty) ** (1 / max(stages - 1, 1))
        return [
            self.first_penalty * ratio ** (step * stages // self.iterations)
            for step in range(self.iterations)
        ]

    @override
    def flops(self, outputs: int, inputs: int) -> int:
        return 2 * (self.iterations + self.refine_iterations) * outputs * inputs**2

    @override
    def inverses(self, outputs: Sequence[int]) -> int:
        return len(set(self._penalties()))

    @override
    def kept_squares(self, outputs: Sequence[int]) -> int:
        return len(set(self._penalties())) - 1 if _share_inverses(outputs) else 0


def solve_admm(  # noqa: PLR0913  independent options
    layers: Sequence[Layer],
    damping: float,
    project: Projection,
    penalties: Iterable[float],
    upcoming: Upcoming,
    *,
    choose_scale: bool = False,
    kept: Inverses | None = None,
) -> list[Pruned]:
    """Return layers with the masks and weights that ADMM finds.

    Weights of dead inputs (zero in every token) are pruned first; those kept are not changed, and
    neither is any weight where nothing is pruned.

    Args:
        layers: Layers with the same inputs and the same Gram matrix, stacked.
        damping: λ, as a fraction of the Gram matrix's mean diagonal.
        project: P, for these layers.
        penalties: ρ of each iteration.
        upcoming: The penalties that follow one, for ranks that share the inverses.
        choose_scale: Whether s may be optimal brain surgeon's, see :func:`_scale`.
        kept: Inverses for other layers with this Gram matrix, which gets those computed.

    Raises:
        NumericsError: The Gram matrix is not positive definite.
    """
    import torch
    from prunekit_kernels import admm, mean_diagonal, unit_scale

    G, ranks, stats = layers[0].stats[Gram].full, layers[0].stats.ranks, layers[0].stats
    wanda = unit_scale(G, damping * mean_diagonal(G))
    try:
        s = stats.once(
            ("scale", damping, choose_scale),
            lambda: _scale(G, wanda, ranks) if choose_scale else wanda,
        )
        B = torch.cat([layer.weight for layer in layers]).mul_(s)
        B.masked_fill_(G.diagonal() == 0, 0)
        D = admm(B, G, s, project, penalties, _inverses(G, s, wanda, upcoming, ranks, kept))
    except ArithmeticError as error:
        raise NumericsError(f"{layers[0].name}: {error} Use more calibration tokens.") from error
    change = D.sub_(B).div_(s)
    del B
    counts = row_counts(layers)
    parts = change.split(counts), project.keep.split(counts)
    return [
        Pruned(rows.add_(layer.weight).masked_fill_(~keep, 0), keep, {"damping": damping})
        for layer, rows, keep in zip(layers, *parts, strict=True)
    ]


def _scale(G: Float[Tensor, "I I"], wanda: Float[Tensor, " I"], ranks: Ranks) -> Tensor:
    """Return s: Wanda's scale, or optimal brain surgeon's.

    The latter where inputs share one direction, so that most of their energy is common to all.
    """
    from prunekit_kernels import COMMON, FLOOR, common_share, own_scale, to_host, value_of

    # The only number of a stage for which the host waits before it goes on.
    if not ranks.run_on_main(lambda: value_of(to_host(common_share(G, wanda) > COMMON))):
        return wanda
    inverse = _inverses(G, wanda, wanda, lambda penalty, _: [penalty], ranks)
    return own_scale(wanda, inverse(FLOOR, None))


def _share_inverses(outputs: Sequence[int]) -> bool:
    """Return whether layers of these outputs are too wide to be stacked."""
    return len(outputs) > 1 and sum(outputs) > MAX_STACKED_ROWS


def _inverses(
    G: Float[Tensor, "I I"],
    s: Float[Tensor, " I"],
    wanda: Float[Tensor, " I"],
    upcoming: Upcoming,
    ranks: Ranks,
    kept: Inverses | None = None,
) -> Invert:
    """Return the function ρ ↦ (A + ρI)⁻¹.

    Args:
        G: The Gram matrix, both triangles.
        s: The scale of A.
        wanda: √diag(G + λI), which holds the damping.
        upcoming: The penalties that follow one.
        ranks: The ranks that share the inverses.
        kept: Gets each inverse, and those in it are not computed again; None to keep none.
    """
    from prunekit_kernels import damped_inverse

    def invert(penalty: float, spare: Tensor | None) -> Tensor:
        return damped_inverse(G, s, penalty, spare, wanda)

    shared = shared_inverses(invert, G, upcoming, ranks)

    def once(penalty: float, _: Tensor | None) -> Tensor:
        assert kept is not None
        if penalty not in kept:
            kept[penalty] = shared(penalty, None)
        return kept[penalty]

    return shared if kept is None else once
