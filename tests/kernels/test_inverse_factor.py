import pytest
import torch
from prunekit_kernels import inverse_factor, pending
from prunekit_kernels.inverse_factor import (
    LEAF,
    PANEL,
    _reverse,
    inverse_factor_reference,
    invert_factored,
)

from tests.kernels.allocation import peak_bytes
from tests.support.closeness import assert_close


def gram_of(inputs, device, tokens=None):
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(tokens or 4 * inputs, inputs, generator=generator, dtype=torch.float64)
    return (x.T @ x).float().to(device)


@pytest.mark.parametrize("inputs", [1, 2, 33, LEAF, LEAF + 1, 3 * LEAF + 5])
def test_equals_the_published_three_steps(inputs, device):
    gram = gram_of(inputs, device)
    exact = inverse_factor_reference(gram.double(), 0.01)
    plain = inverse_factor_reference(gram, 0.01)
    assert_close(inverse_factor(gram, 0.01).upper, exact, plain)


def test_inverts_the_damped_matrix(device):
    gram = gram_of(50, device)
    upper = inverse_factor(gram, 0.1).upper.double()
    damped = gram.double() + 0.1 * gram.diagonal().mean() * torch.eye(50, device=device)
    unit = torch.eye(50, dtype=torch.float64, device=device)
    assert torch.equal(upper, upper.triu())
    assert (upper.T @ upper @ damped - unit).abs().max() < 1e-5


def test_reads_only_the_lower_triangle_and_changes_nothing(device):
    gram = gram_of(2 * LEAF, device)
    half = gram.tril() + torch.full_like(gram, float("nan")).triu(1)
    before = half.clone()
    assert torch.equal(inverse_factor(half, 0.01).upper, inverse_factor(gram, 0.01).upper)
    assert torch.equal(half.nan_to_num(7.0), before.nan_to_num(7.0))


def test_dead_inputs_get_diagonal_one(device):
    gram = gram_of(9, device)
    gram[2], gram[:, 2] = 0, 0
    factor = inverse_factor(gram, 0.01)
    assert factor.dead.nonzero().flatten().tolist() == [2]
    exact = inverse_factor_reference(gram.double(), 0.01)
    assert_close(factor.upper, exact, inverse_factor_reference(gram, 0.01))


def test_all_inputs_dead_is_the_identity(device):
    factor = inverse_factor(torch.zeros(5, 5, device=device), 0.0)
    assert factor.dead.all()
    assert torch.equal(factor.upper, torch.eye(5, device=device))


def test_keeps_the_damping_when_it_suffices(device):
    assert inverse_factor(gram_of(20, device), 0.0).damping == 0


@pytest.mark.parametrize(
    ("entry", "asked", "used"), [(1.05, 0.01, 0.1), (1.05, 0.0, 0.1), (1.5, 0.1, 1.0)]
)
def test_raises_the_damping_tenfold(entry, asked, used, device):
    gram = torch.tensor([[1.0, entry], [entry, 1.0]], device=device)
    assert inverse_factor(gram, asked).damping == pytest.approx(used)


def skip_unless_lost(gram):
    """Skip on a GPU whose library rounds otherwise, so that float64 is not needed."""
    lost = bool(torch.linalg.cholesky_ex(gram).info != 0)
    if gram.is_cuda and not lost:
        pytest.skip("this library's Cholesky of float32 succeeds")
    assert lost


def test_tries_float64_before_more_damping(device):
    # Positive definite by the rounding of its last entry, which a float32 Cholesky loses.
    gram = torch.tensor([[9.0, 10.0], [10.0, 0.0]], device=device)
    gram[1, 1] = torch.nextafter(torch.tensor(100 / 9), torch.tensor(99.0))
    skip_unless_lost(gram)
    assert inverse_factor(gram, 0.0).damping == 0


def test_few_tokens_need_only_damping(device):
    factor = inverse_factor(gram_of(60, device, tokens=5), 0.01)
    assert factor.damping == 0.01
    assert factor.upper.isfinite().all()


@pytest.mark.parametrize("entry", [3.0, float("nan"), float("inf")])
def test_gives_up_naming_the_last_damping(entry, device):
    gram = torch.tensor([[1.0, entry], [entry, 1.0]], device=device)
    with pytest.raises(ArithmeticError, match="not positive definite, even with a damping of 1 "):
        inverse_factor(gram, 0.01)


@pytest.mark.parametrize("size", [0, 1, 2, 2 * PANEL, 2 * PANEL + 1, 3 * PANEL + 5])
def test_reverses_in_place(size):
    square = torch.randn(size, size)
    expected = square.flip((0, 1))
    _reverse(square)
    assert torch.equal(square, expected)


def workspace(gram):
    """Return the matrices that the library of a GPU may take for itself."""
    return 1 if gram.is_cuda else 0


def test_works_in_one_matrix_and_a_few_panels(device):
    inputs = 8 * PANEL
    gram = gram_of(inputs, device)
    most = peak_bytes(lambda: inverse_factor(gram, 0.01))
    assert 1 <= most / gram.nbytes <= 1 + 2.2 * PANEL / inputs + workspace(gram)


def test_in_float64_works_in_three(device):
    inputs = 8 * PANEL
    gram = torch.eye(inputs, device=device)
    # As in the test of float64 above: the first Cholesky fails, so all of both is done.
    gram[-2:, -2:] = torch.tensor([[9.0, 10.0], [10.0, 0.0]])
    gram[-1, -1] = torch.nextafter(torch.tensor(100 / 9), torch.tensor(99.0))
    gram = gram.flip((0, 1))
    skip_unless_lost(gram.flip((0, 1)))
    factors = []
    most = peak_bytes(lambda: factors.append(inverse_factor(gram, 0.0)))
    assert factors[0].damping == 0
    assert 3 <= most / gram.nbytes <= 3 + 4.4 * PANEL / inputs + 2 * workspace(gram)


@pytest.mark.parametrize("size", [1, 5, 130, 300, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("remote", [False, True])
def test_an_inverse_from_its_factor_is_that_of_the_matrix(monkeypatch, device, size, dtype, remote):
    """As on a GPU, and by the library."""
    monkeypatch.setattr(pending, "REMOTE", {"cpu", "cuda"} if remote else set())
    x = torch.randn(2 * size + 4, size, dtype=torch.float64, device=device)
    matrix = x.T @ x / len(x) + 0.1 * torch.eye(size, dtype=torch.float64, device=device)
    work = torch.linalg.cholesky(matrix).to(dtype).T.contiguous()
    invert_factored(work.T)
    expected = torch.linalg.inv(matrix)
    error = (work.double() - expected).norm() / expected.norm()
    assert error < (3e-6 if dtype == torch.float32 else 1e-12)
    assert torch.equal(work, work.T) or not remote
