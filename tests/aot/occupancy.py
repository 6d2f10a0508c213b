"""How many warps a multiprocessor holds, by the resources of a kernel.

Source: NVIDIA, CUDA programming guide, compute capabilities; AMD, CDNA 3 instruction set, 3.6.4.
"""

from typing import NamedTuple

from tests.aot.compile_only import Usage


class Multiprocessor(NamedTuple):
    """What the programs of a multiprocessor share.

    Attributes:
        registers: 32-bit registers.
        unit: Registers of a warp are a multiple of this.
        warps: At most.
        programs: At most.
        shared: Bytes of shared memory.
        reserved: Bytes of it that each program takes besides its own.
        lanes: Of a warp.
    """

    registers: int
    unit: int
    warps: int
    programs: int
    shared: int
    reserved: int
    lanes: int


KIB = 1024
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(65536, 256, 64, 32, 164 * KIB, KIB, 32),
    "sm_90": Multiprocessor(65536, 256, 64, 32, 228 * KIB, KIB, 32),
    "sm_100": Multiprocessor(65536, 256, 64, 32, 228 * KIB, KIB, 32),
    # Four units of 512 registers for each of 64 lanes; the listing counts both register files.
    "gfx942": Multiprocessor(4 * 512 * 64, 8 * 64, 32, 32, 64 * KIB, 0, 64),
}


def resident_warps(target: str, usage: Usage, warps: int, static: int = 0) -> int:
    """Return how many warps a multiprocessor holds at once.

    Args:
        target: The target.
        usage: Of the compiled kernel.
        warps: Of a program.
        static: Bytes of shared memory that assembly declares.
    """
    own = MULTIPROCESSORS[target]
    wanted = max(usage.registers, 1) * own.lanes
    by_registers = own.registers // (-(-wanted // own.unit) * own.unit) // warps
    shared = usage.shared + static + own.reserved
    by_shared = own.shared // shared if shared else own.programs
    return warps * min(by_registers, by_shared, own.warps // warps, own.programs)
