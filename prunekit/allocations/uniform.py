"""Uniform: every layer the same."""

from collections.abc import Mapping
from typing import ClassVar

from typing_extensions import override

from prunekit.allocations.base import Allocation, Survey


class Uniform(Allocation):
    """The same sparsity everywhere."""

    name: ClassVar[str] = "uniform"
    surveys: ClassVar[bool] = False

    @override
    def allocate(
        self,
        sizes: Mapping[str, int],
        survey: Survey,
        sparsity: float,
    ) -> dict[str, float]:
        return dict.fromkeys(sizes, sparsity)
