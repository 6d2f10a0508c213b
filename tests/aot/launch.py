"""One launch that is compiled ahead of time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from tests.aot.compile_only import TARGETS

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FRAME = 16  # ptxas gives some kernels a frame of 8 or 16 bytes though it spills nothing
ONE = ("sm_90",)  # enough for a size or a type that compiles as another one does
NAMES = {F32: "f32", F16: "f16", BF16: "bf16"}


@dataclass(frozen=True)
class Launch:
    """One call of a launcher.

    Attributes:
        op: Name of the file in ``kernels/prunekit_kernels``.
        what: The configuration, in words.
        run: Launches the kernels.
        spills: Bytes of stack per thread allowed on a target; more than a frame only for a reason
            that is given beside the kernel.
        targets: Targets that it is compiled for.
    """

    op: str
    what: str
    run: Callable[[], object]
    spills: Mapping[str, int] = field(default_factory=dict)
    targets: tuple[str, ...] = tuple(TARGETS)

    def most_spilled(self, target: str) -> int:
        """Return the bytes of stack per thread allowed on a target."""
        return self.spills.get(target, FRAME)

    def __str__(self) -> str:
        return f"{self.op}: {self.what}"


def meta(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
