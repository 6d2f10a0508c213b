import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekit_kernels import gram, mirror
from prunekit_kernels.gram import PANEL, _gram, gram_reference

from tests.closeness import assert_close

# The kernel's tiles are 64 here; (2, PANEL + 1) crosses a panel of the CPU path.
SHAPES = [(1, 1), (7, 3), (64, 64), (65, 65), (33, 130), (2, PANEL + 1), (0, 4), (3, 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def lower(x):
    out = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    gram(x, out)
    return out.tril()


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
    torch.library.opcheck(_gram, (x, out))


def test_compiles_without_graph_break(device):
    x, out = torch.randn(9, 4, device=device), torch.zeros(4, 4, device=device)
    torch.compile(gram, backend="aot_eager", fullgraph=True)(x, out)
    assert torch.equal(out.tril(), lower(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4096, 2048), (3001, 4100)], ids=str)
def test_real_sizes(shape, dtype, device):
    check(torch.randn(shape, device=device).to(dtype))
