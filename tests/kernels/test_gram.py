import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekit_kernels import cross_gram, gram, mirror
from prunekit_kernels._triton import runs_triton
from prunekit_kernels.gram import PANEL, RUN, _gram, gram_reference

from tests.support.closeness import assert_close

# The kernel's tiles are 64 here; (2, PANEL + 1) crosses a panel of the CPU path.
SHAPES = [(1, 1), (7, 3), (64, 64), (65, 65), (33, 130), (2, PANEL + 1), (0, 4), (3, 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def lower(x):
    out = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    gram(x, out)
    return out.tril()


def cross_reference(x, y):
    """A CPU rounds sums of bfloat16 products; the kernel does not."""
    if x.dtype == torch.bfloat16 and not runs_triton(x):
        return x.T @ y
    return x.float().T @ y.float()


def check(x):
    exact = (x.double().T @ x.double()).tril()
    assert_close(lower(x), exact, gram_reference(x).tril())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_lower_triangle_of_xtx(shape, dtype, device):
    check(torch.randn(shape, device=device).to(dtype))


@pytest.mark.parametrize("strides", ["transposed", "every other", "offset"])
def test_any_strides(strides, device):
    x = torch.randn(70, 70, device=device)
    check({"transposed": x.T, "every other": x[::2, ::2], "offset": x[3:, 5:]}[strides])


def test_out_may_be_a_view(device):
    x = torch.randn(20, 70, device=device)
    canvas = torch.zeros(75, 80, device=device)
    gram(x, canvas[2:72, 5:75])
    assert torch.equal(canvas[2:72, 5:75].tril(), lower(x))
    canvas[2:72, 5:75] = 0
    assert not canvas.any()


def test_adds_to_what_is_there(device):
    x, out = torch.ones(3, 2, device=device), torch.full((2, 2), 10.0, device=device)
    gram(x, out)
    assert out.tril().tolist() == [[13, 0], [13, 13]]


@pytest.mark.interpret
def test_kernel_leaves_the_upper_triangle_alone(device):
    out = torch.full((70, 70), float("nan"), device=device).triu(1)
    gram(torch.randn(5, 70, device=device), out)
    assert out[torch.ones_like(out).triu(1).bool()].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 5), (65, 64, 65), (33, 130, 9), (0, 4, 3)])
def test_cross_products(shape, dtype, device):
    tokens, inputs, others = shape
    x = torch.randn(tokens, inputs, device=device).to(dtype)
    y = torch.randn(tokens, others, device=device).to(dtype)
    out = torch.zeros(inputs, others, device=device)
    cross_gram(x, y, out)
    plain = cross_reference(x, y)
    assert_close(out, x.double().T @ y.double(), plain)
    cross_gram(x, y, out)
    assert_close(out, 2 * (x.double().T @ y.double()), 2 * plain)


ROWS = {
    "mask": torch.arange(70) % 3 > 0,
    "list": torch.tensor([5, 69, 0, 5, 12]),
    "int32 list": torch.arange(69, -1, -2, dtype=torch.int32),
    "no row": torch.tensor([], dtype=torch.int64),
    "masked out": torch.zeros(70, dtype=torch.bool),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_some_rows_count(dtype, rows, device):
    x, y = torch.randn(2, 70, 70, device=device).to(dtype)
    rows = rows.to(device)
    out = torch.zeros(70, 70, device=device)
    gram(x, out, rows)
    wide = x[rows].double()
    assert_close(out.tril(), (wide.T @ wide).tril(), gram_reference(x[rows]).tril())
    out.zero_()
    cross_gram(x, y, out, rows)
    assert_close(out, wide.T @ y[rows].double(), cross_reference(x[rows], y[rows]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_float32(dtype, device):
    # A sum in bfloat16 would stop at 256, one of float16 at 2048.
    x = torch.ones(5000, 3, dtype=dtype, device=device)
    assert lower(x).diagonal().tolist() == [5000] * 3


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_large_and_tiny_magnitudes(scale, device):
    check(torch.randn(70, 20, device=device) * scale)


def test_refuses_rows_that_are_neither_mask_nor_list():
    for rows in (torch.ones(3, dtype=torch.bool), torch.ones(4), torch.ones(2, 2).long()):
        with pytest.raises(ValueError, match=r"rows must be bool of shape \(4,\)"):
            gram(torch.ones(4, 2), torch.zeros(2, 2), rows)


@pytest.mark.parametrize("row", [-1, 4])
def test_refuses_rows_that_are_not_there(row):
    for other in (None, torch.ones(4, 2)):
        with pytest.raises(RuntimeError, match="rows must be from 0 to 3"):
            _gram(torch.ones(4, 2), other, torch.zeros(2, 2), torch.tensor([0, row]))


@pytest.mark.parametrize("rows", [None, "mask", "list"])
def test_runs_of_tokens_add_up(rows, device):
    x = torch.randn(2 * RUN + 3, 5, device=device).bfloat16()
    chosen = {
        None: None,
        "mask": torch.arange(len(x), device=device) % 3 > 0,
        "list": torch.arange(len(x) - 1, -1, -1, device=device),
    }[rows]
    out = torch.zeros(5, 5, device=device)
    gram(x, out, chosen)
    taken = x if chosen is None else x[chosen]
    exact = (taken.double().T @ taken.double()).tril()
    assert_close(out.tril(), exact, gram_reference(taken).tril())


def test_refuses_another_number_of_tokens():
    with pytest.raises(ValueError, match="of 4 tokens on cpu, got"):
        cross_gram(torch.ones(4, 2), torch.ones(5, 2), torch.zeros(2, 2))


def test_same_bits_each_time(device):
    x = torch.randn(70, 100, device=device)
    assert torch.equal(lower(x), lower(x))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 70))
def test_parts_add_up_to_the_whole(first, second, inputs):
    x = torch.randint(-8, 9, (first + second, inputs)).float()
    out = torch.zeros(inputs, inputs)
    gram(x[:first], out)
    gram(x[first:], out)
    assert torch.equal(out.tril(), lower(x))


@pytest.mark.parametrize("size", [0, 1, 5, PANEL, 2 * PANEL + 1])
def test_mirror_copies_the_lower_triangle_onto_the_upper(size, device):
    full = torch.randn(size, size, device=device)
    full = full + full.T
    out = full.tril() + torch.full_like(full, float("nan")).triu(1)
    assert mirror(out) is out
    assert torch.equal(out, full)


def test_ignores_a_callers_tf32(device):
    x = torch.randn(300, 70, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        check(x)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("out", [torch.zeros(2), torch.zeros(2, 2, dtype=torch.float64)])
def test_refuses_another_out(out):
    with pytest.raises(ValueError, match="out must be float32 of shape"):
        gram(torch.ones(4, 2), out)


def test_is_a_proper_op(device):
    x, out = torch.randn(9, 4, device=device), torch.zeros(4, 4, device=device)
    torch.library.opcheck(_gram, (x, None, out, None))


def test_compiles_without_graph_break(device):
    x, out = torch.randn(9, 4, device=device), torch.zeros(4, 4, device=device)
    torch.compile(gram, backend="aot_eager", fullgraph=True)(x, out)
    assert torch.equal(out.tril(), lower(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4096, 2048), (3001, 4100)], ids=str)
def test_real_sizes(shape, dtype, device):
    check(torch.randn(shape, device=device).to(dtype))
