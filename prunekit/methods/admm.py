"""ADMM: the mask is searched for together with the weights that make up for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Bool, Float, UInt8
from pydantic import Field
from typing_extensions import override

from prunekit.distributed.ranks import Ranks
from prunekit.errors import NumericsError
from prunekit.methods.base import Method
from prunekit.methods.layer import Layer, Pruned
from prunekit.methods.refine import damped, refine
from prunekit.methods.target import Target
from prunekit.patterns import Grouped, Scope
from prunekit.statistics import Gram, Statistic, lower_panels

if TYPE_CHECKING:
    from torch import Tensor

Ahead = Callable[[float, int], Sequence[float]]
STAGES = 7
"""Penalties, one after another, three iterations each; more cost an inverse each and err alike."""
STACKED = 4096
"""Rows up to which the layers of a stage are solved as one, so that they share the inverses."""


class Admm(Method):
    """ADMM with a rising penalty, then conjugate gradients on the mask that it found.

    The problem is that of ALPS (Meng et al., arXiv:2406.07831), the penalty rises geometrically.
    Where inputs have much in common they are scaled by what is their own, too.
    """

    name: ClassVar[str] = "admm"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})
    scope: ClassVar[Scope] = "layer"
    target: ClassVar[Target] = "dense"
    copies: ClassVar[float] = 8
    squares: ClassVar[int] = 1
    shared_inverses: ClassVar[bool] = True

    damping: float = Field(default=0.001, ge=0, le=1)
    """Added to the Gram matrix's diagonal at least, as a fraction of its mean; where tokens are few
    more, half of the inputs a token, up to 1."""
    iterations: int = Field(default=20, ge=1)
    """Steps of ADMM, a matrix product each; 60 err 1 % less."""
    first_penalty: float = Field(default=0.15, gt=0)
    """Weight of the constraint at the start, as a fraction of the Gram matrix's mean diagonal."""
    last_penalty: float = Field(default=1.0, gt=0)
    """Weight of the constraint in the last steps."""
    refine_iterations: int = Field(default=6, ge=0)
    """Steps of conjugate gradients at the end, a matrix product each."""

    @override
    def flops(self, outputs: int, inputs: int) -> int:
        return 2 * (self.iterations + self.refine_iterations) * outputs * inputs**2

    @override
    def inverses(self, outputs: Sequence[int]) -> int:
        return len(set(self._rise())) * (len(outputs) if sum(outputs) > STACKED else 1)

    @override
    def prune(self, layer: Layer) -> Pruned:
        return self.prune_together([layer])[0]

    @override
    def prune_together(self, layers: Sequence[Layer]) -> list[Pruned]:
        """Search for the masks of narrow layers at once: they share the Gram matrix."""
        if sum(layer.outputs for layer in layers) > STACKED:
            return [self._solve([layer])[0] for layer in layers]
        return self._solve(layers) if layers else []

    def _solve(self, layers: Sequence[Layer]) -> list[Pruned]:
        penalties = self._rise()
        distinct = [*dict.fromkeys(penalties)]

        def ahead(penalty: float, count: int) -> list[float]:
            return distinct[distinct.index(penalty) :][:count]

        damping = damped(layers[0].stats[Gram], self.damping)
        found = search(layers, damping, Projection(layers), penalties, ahead, own=True)
        return [
            refine(layer, pruned, damping, self.refine_iterations)
            for layer, pruned in zip(layers, found, strict=True)
        ]

    def _rise(self) -> list[float]:
        stages = min(STAGES, self.iterations)
        ratio = (self.last_penalty / self.first_penalty) ** (1 / max(stages - 1, 1))
        return [
            self.first_penalty * ratio ** (step * stages // self.iterations)
            for step in range(self.iterations)
        ]


@dataclass
class Projection:
    """Projects stacked layers onto what their pattern allows.

    Attributes:
        layers: One above the other.
        bits: The packed mask of each, as the last projection chose it.
    """

    layers: Sequence[Layer]
    bits: Sequence[UInt8[Tensor, "O B"]] = ()

    def __call__(self, x: Float[Tensor, "O I"], dual: Float[Tensor, "O I"]) -> None:
        """Replace ``x`` by the nearest allowed to x + dual, and ``dual`` by what is left."""
        counts = rows(self.layers)
        parts = zip(self.layers, x.split(counts), dual.split(counts), strict=True)
        self.bits = [_project(*part) for part in parts]

    @property
    def keep(self) -> Bool[Tensor, "O I"]:
        """What stays."""
        import torch
        from prunekit_kernels import unpack

        inputs = self.layers[0].weight.shape[1]
        return torch.cat([unpack(bits, inputs) for bits in self.bits])


def _project(
    layer: Layer, x: Float[Tensor, "O I"], dual: Float[Tensor, "O I"]
) -> UInt8[Tensor, "O B"]:
    from prunekit_kernels import pack, project

    pattern = layer.pattern
    if isinstance(pattern, Grouped) and not pattern.tiled:
        outputs, inputs = x.shape
        return project(x, dual, 1.0, pattern.groups(outputs, inputs, layer.sparsity), x)
    # Tiles that lose the least Σ T² are nearest, where `project` compares Σ |T|; single weights are
    # compared as it does, so that the rows of several ranks are chosen as those of one.
    x += dual
    keep = pattern.keep(x.square() if pattern.tiled else x.abs(), layer.sparsity)
    dual.copy_(x).masked_fill_(keep, 0)
    x -= dual
    return pack(keep)


class Inverses:
    """Gives inverses, each made by one rank for all, of whom each makes one at a time.

    So a rank makes one that is to come while the others make theirs, and hands it round when it is
    needed: it holds two, that one and the one in use.

    Args:
        gram: Both triangles.
        scale: As for :func:`prunekit_kernels.damped_inverse`.
        unit: The same.
        ahead: ``ahead(penalty, count)`` returns up to so many penalties that will be asked for,
            that one first. If then another is asked for, what was made for nothing is dropped.
        ranks: Who share them; all ask for the same.
    """

    def __init__(
        self,
        gram: Float[Tensor, "I I"],
        scale: Float[Tensor, " I"],
        unit: Float[Tensor, " I"] | None,
        ahead: Ahead,
        ranks: Ranks,
    ) -> None:
        self._gram, self._scale, self._unit = gram, scale, unit
        self._ahead, self._ranks = ahead, ranks
        self._turn: list[tuple[float, int]] = []
        self._made: Tensor | None = None

    def __call__(self, penalty: float, spare: Float[Tensor, "I I"] | None) -> Float[Tensor, "I I"]:
        """Return the next, in the memory of ``spare`` where there is one that is needed for it.

        Raises:
            ArithmeticError: The Gram matrix is not one; all ranks raise it.
        """
        import torch
        from prunekit_kernels import mirror

        ranks = self._ranks
        if not self._turn or self._turn[0][0] != penalty:
            self._begin_turn(penalty)
        _, maker = self._turn.pop(0)
        ranks.run_on_main(lambda: self._make(penalty), maker)
        found, self._made = (self._made, None) if maker == ranks.rank else (spare, self._made)
        found = torch.empty_like(self._gram) if found is None else found
        ranks.broadcast(maker, lower_panels(found), "inverses")
        return mirror(found)

    def _begin_turn(self, penalty: float) -> None:
        self._made = None
        penalties = self._ahead(penalty, self._ranks.size)
        makers = self._ranks.assign_rounds(len(self._gram) ** 3, len(penalties))
        self._turn = [*zip(penalties, makers, strict=True)]
        for own, maker in self._turn:
            if maker == self._ranks.rank:
                # It fails once more when it is needed, and then all hear of it.
                with suppress(ArithmeticError):
                    self._make(own)

    def _make(self, penalty: float) -> None:
        from prunekit_kernels import damped_inverse

        if self._made is None:
            self._made = damped_inverse(self._gram, self._scale, penalty, None, self._unit)


def rows(layers: Sequence[Layer]) -> list[int]:
    """Return how many rows each layer has."""
    return [len(layer.weight) for layer in layers]


def search(
    layers: Sequence[Layer],
    damping: float,
    project: Projection,
    penalties: Iterable[float],
    ahead: Ahead,
    *,
    own: bool = False,
) -> list[Pruned]:
    """Return the masks that ADMM finds and the weights that it found with them.

    The layers read the same inputs. A dead one never spoke, so its weights go first; those that may
    stay keep their value, as do all where nothing is pruned. Ranks share the inverses, for which
    ``ahead`` says which penalties come next, as for :class:`Inverses`. With ``own``, inputs that
    have much in common are scaled by what is their own.

    Raises:
        NumericsError: The Gram matrix is not one.
    """
    import torch
    from prunekit_kernels import (
        COMMON,
        FLOOR,
        admm,
        common_share,
        damped_inverse,
        mean_diagonal,
        own_scale,
        unit_scale,
    )

    stats = layers[0].stats
    gram, ranks = stats[Gram].full, stats.ranks
    unit = unit_scale(gram, damping * mean_diagonal(gram))

    def inverses(scale: Tensor, ahead: Ahead) -> Inverses | partial[Tensor]:
        if ranks.is_distributed:
            return Inverses(gram, scale, unit, ahead, ranks)
        return partial(damped_inverse, gram, scale, unit=unit)

    def scaled() -> Tensor:
        if not own or not ranks.run_on_main(lambda: common_share(gram, unit) > COMMON):
            return unit
        return own_scale(unit, inverses(unit, lambda penalty, _: [penalty])(FLOOR, None))

    try:
        scale = stats.once(("scale", damping, own), scaled)
        target = torch.cat([layer.weight for layer in layers]).mul_(scale)
        target.masked_fill_(gram.diagonal() == 0, 0)
        found = admm(target, gram, scale, project, penalties, inverses(scale, ahead))
    except ArithmeticError as error:
        raise NumericsError(f"{layers[0].name}: {error} Use more calibration tokens.") from error
    found.sub_(target).div_(scale)
    del target
    counts = rows(layers)
    parts = found.split(counts), project.keep.split(counts)
    return [
        Pruned(change.add_(layer.weight).masked_fill_(~keep, 0), keep, {"damping": damping})
        for layer, change, keep in zip(layers, *parts, strict=True)
    ]
