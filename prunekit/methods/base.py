"""The two shapes of a pruning method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from typing_extensions import override

from prunekit.methods.layer import Layer, Pruned
from prunekit.methods.target import Target
from prunekit.patterns import Grouped, Scope
from prunekit.statistics import Statistic

if TYPE_CHECKING:
    from torch import Tensor

Propagation = Literal["block", "stage", "none"]


class Method(BaseModel, ABC):
    """Weight, gathered statistics and pattern → new weight and ``keep`` mask.

    A subclass is also the part of ``[prune]`` that belongs to it: its fields are its settings,
    each documented by the string under it. ``needs`` are the statistics it reads, ``scope`` the
    group in which the published method compares unstructured scores, ``propagation`` how soon
    layers should see the pruned ones before them, ``target`` what the weights that stay aim at.

    For the plan, ``copies`` are the float32 matrices of the size of what is pruned together that it
    holds, the dense one included, ``squares`` those of inputs × inputs beside the statistics, and
    ``shared_inverses`` says whether each inverse of a Gram matrix is made by one rank for all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: ClassVar[str]
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    scope: ClassVar[Scope] = "row"
    propagation: ClassVar[Propagation] = "stage"
    target: ClassVar[Target] = "layer"
    copies: ClassVar[float] = 2.25
    squares: ClassVar[int] = 0
    shared_inverses: ClassVar[bool] = False

    def flops(self, outputs: int, inputs: int) -> int:
        """Return the operations that so many rows take, about; by default two a weight."""
        return 2 * outputs * inputs

    def inverses(self, outputs: Sequence[int]) -> int:  # noqa: ARG002  for subclasses
        """Return how many inverses, or factors of them, the layers of a stage take."""
        return 0

    def flops_of_inverse(self, inputs: int) -> int:
        """Return the operations of one."""
        return inputs**3

    @abstractmethod
    def prune(self, layer: Layer) -> Pruned:
        """Return the pruned layer; ``layer.weight`` is not changed."""

    def prepare(self, stages: Sequence[Sequence[Layer]]) -> None:
        """Do what ranks can do apart, before stages whose statistics are all known are pruned.

        What the layers weigh is not known yet: ``layer.weight`` has a shape only.
        """

    def prune_together(self, layers: Sequence[Layer]) -> list[Pruned]:
        """Prune the layers of a stage, which share statistics, as :meth:`prune` prunes each."""
        return [self.prune(layer) for layer in layers]


class Scored(Method):
    """A method that ranks weights once and leaves the kept ones as they are."""

    # As Wanda was published. By stage its perplexity was 0.5 to 5 % higher (stories15M): what the
    # pruned stages before it give is off, and nothing makes up for that.
    propagation: ClassVar[Propagation] = "block"

    @abstractmethod
    def score(self, layer: Layer) -> Float[Tensor, "O I"]:
        """Return the scores; higher stays."""

    @override
    def prune(self, layer: Layer) -> Pruned:
        keep = layer.pattern.keep(self.score(layer), layer.sparsity)
        return Pruned(layer.weight.where(keep, 0), keep)


class Factors(NamedTuple):
    """Makes a score of a weight: ``|W| · (row + column) · scale``; None leaves a factor out.

    Attributes:
        scale: [I] float32.
        shares: ``row`` [O] and ``column`` [I], float32.
    """

    scale: Float[Tensor, " I"] | None = None
    shares: tuple[Float[Tensor, " O"], Float[Tensor, " I"]] | None = None


class Weighed(Scored):
    """A scored method whose score is the magnitude times factors of rows and columns.

    Where the pattern is counts within groups of single weights, a GPU computes scores where they
    are compared, and stores none.
    """

    @abstractmethod
    def factors(self, layer: Layer) -> Factors:
        """Return the factors of the magnitude."""

    @override
    def score(self, layer: Layer) -> Float[Tensor, "O I"]:
        from prunekit_kernels.score_and_mask import score

        return score(layer.weight, *self.factors(layer))

    @override
    def prune(self, layer: Layer) -> Pruned:
        from prunekit_kernels import score_and_mask, unpack

        if not isinstance(layer.pattern, Grouped):
            return super().prune(layer)
        weight = layer.weight.clone()
        outputs, inputs = weight.shape
        groups = layer.pattern.groups(outputs, inputs, layer.sparsity)
        bits = score_and_mask(weight, groups, *self.factors(layer))
        return Pruned(weight, unpack(bits, inputs))
