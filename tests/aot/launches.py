"""Every launch that is compiled ahead of time: the real launchers, on meta tensors of real sizes.

A kernel that spills registers says here why it may.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from prunekit_kernels import Groups, _choosing, column_energy, gram, packed_mask

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Launch:
    """One call of a launcher.

    Attributes:
        op: Name of the file in ``kernels/prunekit_kernels``.
        what: The configuration, in words.
        run: Launches.
        spills: Why it may spill, and how many bytes a thread at most; None where it must not.
    """

    op: str
    what: str
    run: Callable[[], object]
    spills: tuple[str, int] | None = None


def launches() -> Iterator[Launch]:
    """Yield every configuration of every kernel."""
    yield from _statistics()
    yield from _selection()


def _statistics() -> Iterator[Launch]:
    # SmolLM2-135M (576), Llama-3.1-8B's down_proj (14336), and an odd number; float16 compiles as
    # bfloat16 does, so once is enough.
    for dtype, inputs in [
        (F32, 576), (F32, 14336), (BF16, 576), (BF16, 14336), (BF16, 1001), (F16, 14336),
    ]:  # fmt: skip
        x, what = meta(2048, inputs, dtype=dtype), f"{_name(dtype)} I={inputs}"
        yield Launch("column_energy", what, _call(column_energy, x, meta(inputs)))
        yield Launch("gram", what, _call(gram, x, meta(inputs, inputs)), _GRAM)


# The assembler that comes with Triton 3.7 spills a few registers of gram's wide tiles, where that of
# 3.6 and 3.9 spills none.
_GRAM = None


def _call(function, *arguments):
    launch = function.__globals__["_launch"]
    return lambda: launch(*arguments)
