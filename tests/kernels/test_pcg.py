import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekit_kernels import mean_diagonal, pcg
from prunekit_kernels.pcg import _pcg, pcg_reference

from tests.kernels.allocation import peak_bytes
from tests.kernels.layers import correlated, loss

SHAPES = [(1, 1), (1, 33), (7, 64), (33, 1), (20, 129)]


def problem(outputs, inputs, device="cpu", dtype=torch.float64, kept=0.5):
    weight, gram = correlated(outputs, inputs, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    keep = torch.rand(outputs, inputs, generator=generator).to(device) < kept
    return weight, gram, keep


def solved(target, gram, keep, ridge=0.0, iterations=10):
    weight = target * keep
    pcg(weight, target, gram, keep, ridge, iterations)
    return weight


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tends_to_exact_least_squares(shape, ridge, device):
    target, gram, keep = problem(*shape, device=device)
    ridge *= float(gram.diagonal().mean())
    exact = pcg_reference(target, gram, keep, ridge)
    found = solved(target, gram, keep, ridge, iterations=4 * shape[1] + 5)
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 30), st.floats(0, 1))
def test_tends_to_exact_least_squares_on_any_support(outputs, inputs, kept):
    target, gram, keep = problem(outputs, inputs, kept=kept)
    ridge = 0.01 * float(gram.diagonal().mean())
    exact = pcg_reference(target, gram, keep, ridge)
    found = solved(target, gram, keep, ridge, iterations=4 * inputs)
    assert torch.equal(found[~keep], torch.zeros_like(found[~keep]))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5 * float(target.abs().max()))


def test_ten_iterations_come_close_and_never_go_back(device):
    target, gram, keep = problem(16, 256, device=device, dtype=torch.float32)
    best = loss(pcg_reference(target.double(), gram.double(), keep), target, gram)
    losses = [loss(solved(target, gram, keep, iterations=n), target, gram) for n in range(11)]
    assert losses == sorted(losses, reverse=True)
    assert losses[10] - best < 0.1 * (losses[0] - best)


def test_float32_is_as_good_as_float64(device):
    target, gram, keep = problem(16, 256, device=device)
    exact = loss(solved(target, gram, keep), target, gram)
    single = solved(target.float(), gram.float(), keep)
    assert loss(single, target, gram) <= 1.001 * exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_changes_nothing_where_all_stays_or_nothing_does(dtype, device):
    target, gram, _ = problem(5, 40, device=device, dtype=dtype)
    for stays in (True, False):
        keep = torch.full_like(target, stays, dtype=torch.bool)
        assert torch.equal(solved(target, gram, keep, 0.1), target * keep)


def test_dead_inputs_keep_their_weights(device):
    target, gram, keep = problem(8, 40, device=device)
    gram[5], gram[:, 5] = 0, 0
    found = solved(target, gram, keep)
    assert torch.equal(found[:, 5], (target * keep)[:, 5])
    assert found.isfinite().all()
    assert torch.equal(solved(target, gram * 0, keep), target * keep)


def test_a_slice_of_rows_is_solved_as_within_all(device):
    target, gram, keep = problem(33, 64, device=device)
    whole = solved(target, gram, keep)
    parts = [solved(target[rows], gram, keep[rows]) for rows in (slice(0, 5), slice(5, 33))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-9)


def test_works_on_views_in_place(device):
    target, gram, keep = problem(6, 30, device=device)
    stored = (target * keep).T.contiguous()
    pcg(stored.T, target, gram.T, keep)
    torch.testing.assert_close(stored.T, solved(target, gram, keep))


def test_same_bits_each_time(device):
    given = problem(9, 70, device=device, dtype=torch.float32)
    assert torch.equal(solved(*given), solved(*given))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_weights_stay_empty(shape):
    weight = torch.zeros(shape)
    pcg(weight, weight, torch.eye(shape[1]), weight > 0)
    assert weight.shape == shape


def test_allocates_four_matrices(device):
    target, gram, keep = problem(256, 512, device=device, dtype=torch.float32)
    weight = target * keep
    most = peak_bytes(lambda: pcg(weight, target, gram, keep))
    assert 3.9 <= most / weight.nbytes <= 4.1


def test_ignores_a_callers_tf32(device):
    given = problem(16, 128, device=device, dtype=torch.float32)
    expected = solved(*given)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(solved(*given), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("target", torch.zeros(2, 4)),
        ("gram", torch.zeros(3, 3, dtype=torch.float64)),
        ("keep", torch.zeros(2, 3)),
    ],
)
def test_refuses_what_does_not_fit(name, wrong):
    weight = torch.zeros(2, 3)
    given = {"target": weight, "gram": torch.eye(3), "keep": weight == 0, name: wrong}
    with pytest.raises(ValueError, match=f"{name} must be"):
        pcg(weight, **given)


def test_is_a_proper_op(device):
    target, gram, keep = problem(4, 9, device=device)
    ridge = torch.full((), 0.1, dtype=torch.float64, device=device)
    torch.library.opcheck(_pcg, (target * keep, target, gram, keep, ridge, 3))


def test_compiles_without_graph_break(device):
    target, gram, keep = problem(4, 9, device=device)
    weight = target * keep
    torch.compile(pcg, backend="aot_eager", fullgraph=True)(weight, target, gram, keep)
    assert torch.equal(weight, solved(target, gram, keep))


def test_dead_inputs_do_not_count_in_the_mean(device):
    assert mean_diagonal(torch.diag(torch.tensor([4.0, 0.0, 7.0], device=device))) == 5.5
    assert mean_diagonal(torch.zeros(2, 2, device=device)) == 1
