"""Base of allocations of a sparsity budget to layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from prunekit.methods.layer import Layer
from prunekit.statistics import Statistic

Survey = Callable[[], Iterator[list[Layer]]]
"""Each call iterates once over the blocks of the dense model, and yields the layers of each."""


class Allocation(BaseModel, ABC):
    """Sizes, weights and statistics of a dense model → sparsities.

    The fields of a subclass are its settings.

    Attributes:
        needs: The statistics that its survey gathers.
        surveys: Whether it uses weights or statistics; if not, no survey is made.
        methods: Names of the methods that it is defined for; None for all.
        mixes: Whether it may change the n of layers with an n:m pattern.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    name: ClassVar[str]
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    surveys: ClassVar[bool] = True
    methods: ClassVar[frozenset[str] | None] = None
    mixes: ClassVar[bool] = False

    @abstractmethod
    def allocate(
        self, sizes: Mapping[str, int], survey: Survey, sparsity: float
    ) -> dict[str, float]:
        """Return the sparsity of each layer by name.

        Args:
            sizes: Number of weights of each layer that is pruned.
            survey: Iterates over all layers of the dense model, also those that are not pruned.
            sparsity: Fraction of zeros of all layers together, 0..1.
        """
