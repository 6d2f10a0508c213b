"""Every Triton kernel compiles for GPUs that need not be here, without spilling registers.

``pytest -s tests/aot`` prints the table of what each takes.
"""

import os

import pytest
import torch
import triton
from prunekit_kernels import NOfM, Sweep, column_energy, gram, obs_block

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# The assembler that comes with Triton 3.7 spills a few registers of gram's wide tiles, 176 bytes a
# thread at most, where that of 3.6 and 3.9 spills none.
SPILL_BYTES = 256 if triton.__version__.startswith(("3.7", "3.8")) else 0


def launch_column_energy(tokens, inputs, dtype):
    launch = _module(column_energy)["_launch"]
    x = torch.empty(tokens, inputs, dtype=dtype, device="meta")
    launch(x, torch.empty(inputs, device="meta"))


def launch_gram(tokens, inputs, dtype):
    launch = _module(gram)["_launch"]
    x = torch.empty(tokens, inputs, dtype=dtype, device="meta")
    launch(x, torch.empty(inputs, inputs, device="meta"))


def launch_obs_block(outputs, inputs, choice):
    launch = _module(obs_block)["_launch"]
    work = torch.empty(inputs, outputs, device="meta")
    keep = torch.empty(inputs, outputs, dtype=torch.bool, device="meta")
    sweep = Sweep(work, work, keep, torch.empty(inputs, inputs, device="meta"))
    n, m = choice or (0, 1)
    panel = 16 // m * m
    launch(sweep, 0, 128 // panel * panel, n, m)


def _module(function):
    # An op hides the module of the same name: `prunekit_kernels.gram` is the function.
    return function.__globals__


# Inputs of SmolLM2-135M (576), of Llama-3.1-8B's down_proj (14336), and an odd number; float16
# compiles as bfloat16 does, so once is enough.
@pytest.mark.parametrize(
    ("dtype", "inputs"),
    [
        (torch.float32, 576),
        (torch.float32, 14336),
        (torch.bfloat16, 576),
        (torch.bfloat16, 14336),
        (torch.bfloat16, 1001),
        (torch.float16, 14336),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("launch", [launch_column_energy, launch_gram])
def test_compiles_without_spills(launch, target, dtype, inputs, monkeypatch):
    from tests.aot.compile_only import SHARED_LIMITS, compile_only, usage

    with compile_only(target, monkeypatch) as launched:
        launch(2048, inputs, dtype)
    (kernel,) = launched
    taken = usage(kernel)
    print(f"\n{launch.__name__[7:]:14} {target:7} {dtype!s:15} {inputs:6} {taken}", end=" ")  # noqa: T201
    assert taken.spilled <= SPILL_BYTES
    assert taken.shared <= SHARED_LIMITS[target] * 1024


# Rows that are and are not multiples of 16 compile to the same, since alignment is not looked at.
@pytest.mark.parametrize(
    "choice", [None, NOfM(1, 2), NOfM(2, 4), NOfM(4, 8), NOfM(8, 16), NOfM(2, 3)], ids=str
)
@pytest.mark.parametrize("target", TARGETS)
def test_obs_block_compiles_without_spills(target, choice, monkeypatch):
    from tests.aot.compile_only import compile_only, usage

    with compile_only(target, monkeypatch) as launched:
        launch_obs_block(4096, 4096, choice)
        launch_obs_block(1001, 1001, choice)
    aligned, odd = launched
    assert odd.hash == aligned.hash
    taken = usage(aligned)
    print(f"\nobs_block      {target:7} {choice!s:15} {taken}", end=" ")  # noqa: T201
    assert taken.spilled == 0
    assert taken.shared == 0
