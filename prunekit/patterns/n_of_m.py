"""n:m: n weights are kept of every m neighbours along the inputs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Self

from jaxtyping import Bool
from typing_extensions import override

from prunekit.errors import ConfigError
from prunekit.patterns.base import Grouped, WeightScope

if TYPE_CHECKING:
    from prunekit_kernels import Groups
    from torch import Tensor


class NOfM(Grouped):
    """n of every m inputs of a row are **kept**.

    Sparse tensor cores multiply 2:4.
    """

    spelling: ClassVar[str] = "n:m, e.g. 2:4"

    def __init__(self, n: int, m: int) -> None:
        if not 0 < n < m <= 64:
            raise ConfigError(f'pattern "{n}:{m}": n:m keeps n of every m, with 0 < n < m ≤ 64.')
        self.name, self.n, self.m = f"{n}:{m}", n, m
        self.stride = m

    @classmethod
    @override
    def parse(cls, text: str, scope: WeightScope) -> Self | None:
        found = re.fullmatch(r"(\d+):(\d+)", text)
        return cls(int(found[1]), int(found[2])) if found else None

    @property
    @override
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @override
    def at(self, sparsity: float) -> NOfM:
        return NOfM(self.m - round(sparsity * self.m), self.m)

    @override
    def why_not_applicable(self, outputs: int, inputs: int) -> str | None:
        if inputs % self.m == 0:
            return None
        return f"{self.name} needs a multiple of {self.m} inputs, this layer has {inputs}"

    @override
    def groups(self, outputs: int, inputs: int, sparsity: float) -> Groups:
        from prunekit_kernels import Groups

        return Groups(rows=1, columns=self.m, pruned=(self.m - self.n,))

    @override
    def violations(self, keep: Bool[Tensor, "O I"]) -> int:
        return int((keep.unflatten(1, (-1, self.m)).sum(2) > self.n).sum())
