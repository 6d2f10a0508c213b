"""How a sparsity budget is spread over layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from prunekit.methods.layer import Layer
from prunekit.statistics import Statistic

Survey = Callable[[], Iterator[list[Layer]]]
"""Each call walks once over the dense model and gives the layers of one block after another."""


class Allocation(BaseModel, ABC):
    """Sizes (and, where asked for, weights and statistics of the dense model) → sparsities.

    A subclass's fields are its settings. ``needs`` are the statistics its survey has to gather;
    ``surveys`` is False for one that looks at no weight, so that the survey vanishes; ``methods``
    are the methods whose scores it stands for (None: any); ``mixes`` is True for one that
    gives layers of an n:m pattern other n.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: ClassVar[str]
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    surveys: ClassVar[bool] = True
    methods: ClassVar[frozenset[str] | None] = None
    mixes: ClassVar[bool] = False

    @abstractmethod
    def allocate(
        self, sizes: Mapping[str, int], survey: Survey, sparsity: float
    ) -> dict[str, float]:
        """Return the sparsity of each layer of ``sizes`` (name → weights)."""
