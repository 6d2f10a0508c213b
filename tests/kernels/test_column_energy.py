import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekit_kernels import column_energy
from prunekit_kernels.column_energy import (
    RUN,
    TILE_I,
    TILE_T,
    _column_energy,
    column_energy_reference,
)

from tests.support.closeness import assert_close

SHAPES = [(1, 1), (7, 3), (TILE_T, TILE_I), (TILE_T + 1, TILE_I + 1), (RUN + 1, 5), (0, 4), (3, 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def energy(x):
    out = torch.zeros(x.shape[1], device=x.device)
    column_energy(x, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_sum_of_squares(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    assert_close(energy(x), x.double().square().sum(0), column_energy_reference(x))


@pytest.mark.parametrize("strides", ["transposed", "every other", "offset"])
def test_any_strides(strides, device):
    x = torch.randn(70, 70, device=device)
    x = {"transposed": x.T, "every other": x[::2, ::2], "offset": x[3:, 5:]}[strides]
    assert_close(energy(x), x.double().square().sum(0), column_energy_reference(x))


def test_adds_to_what_is_there(device):
    x, out = torch.ones(3, 2, device=device), torch.full((2,), 10.0, device=device)
    column_energy(x, out)
    assert out.tolist() == [13, 13]


@pytest.mark.parametrize(
    "rows", [torch.arange(70) % 3 > 0, torch.tensor([5, 69, 5]), torch.tensor([]).int()], ids=str
)
def test_only_some_rows_count(rows, device):
    x, rows = torch.randn(70, 9, device=device), rows.to(device)
    out = torch.zeros(9, device=device)
    column_energy(x, out, rows)
    assert_close(out, x[rows].double().square().sum(0), column_energy_reference(x[rows]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_float32(dtype, device):
    x = torch.ones(5000, 3, dtype=dtype, device=device)
    assert energy(x).tolist() == [5000] * 3


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_large_and_tiny_magnitudes(scale, device):
    x = torch.randn(70, 20, device=device) * scale
    assert_close(energy(x), x.double().square().sum(0), column_energy_reference(x))


@pytest.mark.parametrize("row", [-1, 4])
def test_refuses_rows_that_are_not_there(row):
    with pytest.raises(RuntimeError, match="rows must be from 0 to 3"):
        column_energy(torch.ones(4, 2), torch.zeros(2), torch.tensor([0, row]))


def test_same_bits_each_time(device):
    x = torch.randn(600, 40, device=device)
    assert torch.equal(energy(x), energy(x))


@pytest.mark.interpret
def test_a_column_does_not_depend_on_its_neighbours(device):
    x = torch.randn(40, TILE_I + 9, device=device)
    assert torch.equal(energy(x)[5:], energy(x[:, 5:].contiguous()))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 20))
def test_parts_add_up_to_the_whole(first, second, inputs):
    x = torch.randint(-8, 9, (first + second, inputs)).float()
    out = torch.zeros(inputs)
    column_energy(x[:first], out)
    column_energy(x[first:], out)
    assert torch.equal(out, energy(x))


@pytest.mark.parametrize(
    "out", [torch.zeros(3), torch.zeros(2, dtype=torch.float16), torch.zeros(2, device="meta")]
)
def test_refuses_another_out(out):
    with pytest.raises(ValueError, match="out must be float32 of shape"):
        column_energy(torch.ones(4, 2), out)


def test_is_a_proper_op(device):
    x, out = torch.randn(9, 4, device=device), torch.zeros(4, device=device)
    torch.library.opcheck(_column_energy, (x, out, None))


def test_compiles_without_graph_break(device):
    x = torch.randn(9, 4, device=device)
    out = torch.zeros(4, device=device)
    torch.compile(column_energy, backend="aot_eager", fullgraph=True)(x, out)
    assert torch.equal(out, energy(x))
