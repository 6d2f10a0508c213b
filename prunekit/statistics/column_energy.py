"""Column energy: Σₜ x[t, i]², the squared input norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from typing_extensions import override

from prunekit.statistics.base import Statistic

if TYPE_CHECKING:
    from torch import Tensor


class ColumnEnergy(Statistic):
    """``total[i] = Σₜ x[t, i]²`` (Sun et al., arXiv:2306.11695, eq. 1, before the root)."""

    name: ClassVar[str] = "column_energy"

    @classmethod
    @override
    def shape(cls, inputs: int) -> tuple[int, ...]:
        return (inputs,)

    @override
    def add(self, x: Float[Tensor, "T I"]) -> None:
        from prunekit_kernels import column_energy

        column_energy(x, self.total)
