"""Listings, occupancy and estimates, on code written by hand."""

import os

import pytest

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

pytest.importorskip("triton")

from bench.ops.estimate import _issued  # noqa: E402
from tests.aot.compile_only import Usage  # noqa: E402
from tests.aot.listing import parsed  # noqa: E402
from tests.aot.occupancy import resident_warps  # noqa: E402

STREAM = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64+0x200] ;
        /*0030*/                   FADD R0, R0, R4 ;
        /*0040*/                   FADD R0, R0, R8 ;
        /*0050*/              @!P0 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_1:
        /*0070*/                   BRA `(.L_x_1);
        /*0080*/                   NOP;
"""
STAGED = """
.L_x_0:
        /*0000*/                   DEPBAR.LE SB0, 0x2 ;
        /*0010*/                   LDS.128 R4, [R2] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R8.64], !P1 ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
"""
WAVES = """
	s_mov_b32 s0, 0
.LBB0_1:
	global_load_dwordx4 v[0:3], v[4:5], off
	v_add_f32_e32 v6, v0, v6
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""


OUT_OF_LINE = """
.L_x_0:
        /*0000*/              @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
        /*0030*/                   EXIT ;
.L_x_2:
        /*0040*/                   MOV R1, R2 ;
        /*0050*/                   BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
"""
AWAITED = """
.LBB0_1:
	s_waitcnt vmcnt(1)
	v_add_f32_e32 v6, v0, v6
	global_load_dwordx4 v[0:3], v[4:5], off
	global_store_dword v[4:5], v6, off
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""


def test_a_branch_back_from_code_out_of_line_is_no_loop():
    (loop,) = parsed(OUT_OF_LINE, "cubin").loops
    assert (loop.first, loop.last) == (0, 2)


def test_loads_that_amd_has_not_awaited():
    code = parsed(AWAITED, "amdgcn")
    assert code.in_flight(code.loops[0]) == 16 * 64
    twice = parsed(AWAITED.replace("vmcnt(1)", "vmcnt(2)"), "amdgcn")
    assert twice.in_flight(twice.loops[0]) == 2 * 16 * 64


def test_loops_and_loads_of_nvidia():
    code = parsed(STREAM, "cubin")
    (loop,) = code.loops
    assert code.within(loop)[0].name == "LDG.E.128"
    assert code.load_bytes(loop) == 32 * 32
    assert code.in_flight(loop) == 32 * 32
    assert code.instructions[-1].name == "EXIT"


def test_loads_that_are_needed_at_once_are_alone():
    swapped = STREAM.splitlines()
    swapped[4], swapped[5] = swapped[5], swapped[4]  # the first is read before the second is issued
    code = parsed("\n".join(swapped), "cubin")
    assert code.in_flight(code.loops[0]) == 16 * 32


def test_copies_that_a_loop_leaves_outstanding():
    code = parsed(STAGED, "cubin")
    assert code.in_flight(code.loops[0]) == 2 * 16 * 32


def test_loops_and_loads_of_amd():
    code = parsed(WAVES, "amdgcn")
    (loop,) = code.loops
    assert code.load_bytes(loop) == 16 * 64
    assert len(code.instructions) == 5


@pytest.mark.parametrize(
    ("usage", "warps", "resident"),
    [
        (Usage(64, 0, 0), 4, 32),  # 65536 registers of 2048 a warp
        (Usage(130, 0, 0), 8, 8),  # rounded up to 136
        (Usage(128, 0, 0), 8, 16),
        (Usage(16, 0, 0), 4, 64),
        (Usage(32, 0, 73 * 1024), 8, 24),
        (Usage(16, 0, 0), 1, 32),  # programs
    ],
)
def test_warps_that_a_multiprocessor_holds(usage, warps, resident):
    assert resident_warps("sm_90", usage, warps) == resident


def test_instructions_of_a_warp():
    code = parsed(STREAM, "cubin")
    assert _issued(code, {}, streamed=10 * 32 * 32) == (2 + 10 * 5, 32 * 32)
    assert _issued(code, {0: 3}, streamed=0) == (2 + 3 * 5, 0)
