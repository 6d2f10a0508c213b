"""Base classes of pruning methods.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from typing_extensions import override

from prunekit.methods.layer import Layer, Pruned
from prunekit.methods.score_statistics import KEY, row_statistics
from prunekit.methods.target import Target
from prunekit.patterns import Grouped, WeightScope
from prunekit.statistics import Statistic

if TYPE_CHECKING:
    from torch import Tensor

Propagation = Literal["block", "stage", "none"]
SCORES_AT_ONCE = 1 << 22
"""Scores in memory for their statistics, where a kernel that selects stores none."""
MAX_STACKED_ROWS = 4096
"""Total rows up to which the layers of a stage are solved as one: they then share the launches of
SparseGPT's sweep and the inverses of ADMM. More rows fill a device alone."""


class Method(BaseModel, ABC):
    """Weight, statistics and pattern → new weight and ``keep`` mask.

    A subclass is also its part of the config table ``[prune]``: its fields are its settings, each
    documented by the string under it.

    Attributes:
        needs: The statistics that it uses.
        scope: The group in which the published method compares unstructured scores.
        propagation: How soon layers receive the outputs of pruned layers before them.
        target: The outputs that the kept weights should reproduce.
        copies: For the plan: float32 matrices held of the size of the weights that are pruned
            together, including the dense weights.
        squares: For the plan: matrices of inputs × inputs held in addition to the statistics.
        shared_inverses: Whether each inverse of a Gram matrix is computed by one rank for all.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    name: ClassVar[str]
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    scope: ClassVar[WeightScope] = "row"
    propagation: ClassVar[Propagation] = "stage"
    target: ClassVar[Target] = "layer"
    copies: ClassVar[float] = 2.25
    squares: ClassVar[int] = 0
    shared_inverses: ClassVar[bool] = False

    def flops(self, outputs: int, inputs: int) -> int:
        """Return the approximate operations for a layer; by default two per weight."""
        return 2 * outputs * inputs

    def inverses(self, outputs: Sequence[int]) -> int:  # noqa: ARG002  for subclasses
        """Return the number of inverses, or factors of them, for a stage.

        Args:
            outputs: Output features of each layer of the stage.
        """
        return 0

    def kept_squares(self, outputs: Sequence[int]) -> int:  # noqa: ARG002  for subclasses
        """Return the matrices of inputs × inputs that a stage holds beyond ``squares``.

        Args:
            outputs: Output features of each layer of the stage.
        """
        return 0

    def flops_of_inverse(self, inputs: int) -> int:
        """Return the operations of one such inverse."""
        return inputs**3

    @abstractmethod
    def prune(self, layer: Layer) -> Pruned:
        """Return the pruned layer; ``layer.weight`` is not changed."""

    def prepare(self, stages: Sequence[Sequence[Layer]]) -> None:
        """Do work that ranks can divide, before several stages are pruned.

        Args:
            stages: The layers of each stage. Their statistics are complete, their weights are not
                loaded yet: ``layer.weight`` has a shape only.
        """

    def prune_together(self, layers: Sequence[Layer]) -> list[Pruned]:
        """Prune layers that share statistics; the results are those of :meth:`prune`."""
        return [self.prune(layer) for layer in layers]


class Stacked(Method):
    """A method that prunes narrow layers of a stage as one matrix."""

    @abstractmethod
    def _solve(self, layers: Sequence[Layer]) -> list[Pruned]:
        """Prune layers that share statistics, stacked by outputs."""

    @override
    def prune(self, layer: Layer) -> Pruned:
        return self.prune_together([layer])[0]

    @override
    def prune_together(self, layers: Sequence[Layer]) -> list[Pruned]:
        """Prune narrow layers stacked, wide ones one after the other."""
        if sum(layer.outputs for layer in layers) > MAX_STACKED_ROWS:
            return [self._solve([layer])[0] for layer in layers]
        return self._solve(layers) if layers else []


class Scored(Method):
    """A method that scores weights once, and leaves kept ones unchanged."""

    # As Wanda was published. By stage its perplexity was 0.5 to 5 % higher (stories15M): outputs of
    # the pruned stages before it have errors, and no weight update compensates for them.
    propagation: ClassVar[Propagation] = "block"

    @abstractmethod
    def score(self, layer: Layer) -> Float[Tensor, "O I"]:
        """Return the score of each weight; the highest are kept."""

    @override
    def prune(self, layer: Layer) -> Pruned:
        from prunekit_kernels.packed_mask import kept

        score = self.score(layer)
        keep = layer.pattern.keep(score, layer.sparsity)
        facts = {KEY: row_statistics(score)} if layer.summarized else {}
        return Pruned(kept(layer.weight, keep), keep, facts)


class ScoreFactors(NamedTuple):
    """Factors of the score ``|W| · (row + column) · scale``; None stands for 1.

    Attributes:
        scale: [I] float32.
        shares: ``row`` [O] and ``column`` [I], float32.
    """

    scale: Float[Tensor, " I"] | None = None
    shares: tuple[Float[Tensor, " O"], Float[Tensor, " I"]] | None = None


class ScaledMagnitude(Scored):
    """A scored method with score magnitude × row and column factors.

    For a pattern of counts within groups of single weights, a GPU computes the scores in the kernel
    that compares them, and stores none.
    """

    @abstractmethod
    def factors(self, layer: Layer) -> ScoreFactors:
        """Return the factors that multiply the magnitude."""

    @override
    def score(self, layer: Layer) -> Float[Tensor, "O I"]:
        from prunekit_kernels.score_and_mask import score

        return score(layer.weight, *self.factors(layer))

    @override
    def prune(self, layer: Layer) -> Pruned:
        from prunekit_kernels import score_and_mask, unpack

        if not isinstance(layer.pattern, Grouped):
            return super().prune(layer)
        weight, factors = layer.weight.clone(), self.factors(layer)
        outputs, inputs = weight.shape
        groups = layer.pattern.groups(outputs, inputs, layer.sparsity)
        facts = {KEY: _statistics(layer.weight, factors)} if layer.summarized else {}
        bits = score_and_mask(weight, groups, *factors)
        return Pruned(weight, unpack(bits, inputs), facts)


def _statistics(weight: Float[Tensor, "O I"], factors: ScoreFactors) -> Float[Tensor, "O 4"]:
    """Return the statistics of each row's scores, some rows at a time."""
    import torch
    from prunekit_kernels.score_and_mask import score

    (outputs, inputs), shares, parts = weight.shape, factors.shares, []
    for start in range(0, outputs, step := max(1, SCORES_AT_ONCE // inputs)):
        rows = slice(start, start + step)
        of_rows = None if shares is None else (shares[0][rows], shares[1])
        parts.append(row_statistics(score(weight[rows], factors.scale, of_rows)))
    return torch.cat(parts)
