import sys
from types import SimpleNamespace

import pytest
import torch
from prunekit_kernels import (
    FLOOR,
    _precision,
    admm,
    common_share,
    damped_inverse,
    inverse_factor,
    mean_diagonal,
    obs_sweep,
    own_scale,
    pcg,
    unit_scale,
)
from prunekit_kernels.admm import admm_reference

from tests.kernels.allocation import peak_bytes
from tests.kernels.layers import correlated, loss, lowest_half

PENALTIES = [0.1 * 50 ** (step // 5 / 5) for step in range(30)]


def projection(choose):
    def project(x, dual):
        x += dual
        keep = choose(x.abs())
        dual.copy_(x * ~keep)
        x *= keep

    return project


ROWS = projection(lowest_half)
PATTERNS = {
    "rows": ROWS,
    "2:4": projection(lambda score: lowest_half(score, 4)),
    "nothing": projection(lambda score: score < 0),
    "everything": projection(lambda score: score >= 0),
}


def unit_gram(gram, damping):
    ridge = damping * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    scale = (gram + ridge).diagonal().sqrt()
    return (gram + ridge) / scale / scale[:, None], scale


@pytest.mark.parametrize("name", ["rows", "2:4"])
@pytest.mark.parametrize("shape", [(1, 4), (3, 64), (33, 128)], ids=str)
def test_equals_the_published_iteration(name, shape, device):
    weight, gram = correlated(*shape, device=device)
    unit, scale = unit_gram(gram, 0.001)
    torch.testing.assert_close(unit_scale(gram, 0.001 * mean_diagonal(gram)), scale)
    found = admm(weight * scale, gram, scale, PATTERNS[name], PENALTIES)
    exact = admm_reference(weight * scale, unit, PATTERNS[name], PENALTIES)
    assert torch.equal(found != 0, exact != 0)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)


def test_any_scale_solves_the_problem_scaled_so(device):
    weight, gram = correlated(9, 64, device=device)
    ridge = 0.001 * mean_diagonal(gram)
    unit = unit_scale(gram, ridge)
    scale = own_scale(unit, damped_inverse(gram, unit, FLOOR))
    damped = gram + ridge * torch.eye(64, device=device)
    kept = damped + FLOOR * torch.diag(unit.square())
    torch.testing.assert_close(scale.square(), 1 / torch.linalg.inv(kept).diagonal())
    found = admm(
        weight * scale, gram, scale, ROWS, PENALTIES,
        lambda penalty, spare: damped_inverse(gram, scale, penalty, spare, unit),
    )  # fmt: skip
    system = damped / scale / scale[:, None]
    torch.testing.assert_close(found, admm_reference(weight * scale, system, ROWS, PENALTIES))


def test_share_of_one_direction_is_the_largest_eigenvalue(device):
    _, gram = correlated(1, 64, device=device)
    gram += 20 * gram.diagonal().mean()
    scale = unit_scale(gram, 0.0)
    largest = torch.linalg.eigvalsh(gram / scale / scale[:, None])[-1]
    assert common_share(gram, scale) == pytest.approx(float(largest) / 64, rel=1e-6)


def refined(weight, gram, found, scale, ridge):
    keep = found != 0
    found = found / scale
    pcg(found, weight, gram, keep, ridge)
    return found


def errors(name, choose, stride, dtype, device):
    weight, gram = correlated(32, 256, device=device)
    ridge = 0.001 * mean_diagonal(gram)
    scale = unit_scale(gram, ridge)
    wanda = weight * choose(weight.abs() * gram.diagonal().sqrt())
    sparsegpt = weight.clone()
    upper = inverse_factor(gram.float(), 0.01).upper.double()
    obs_sweep(sparsegpt, upper, lambda score, start: choose(score), stride)
    given = (weight.to(dtype), gram.to(dtype), scale.to(dtype))
    found = admm(given[0] * given[2], given[1], given[2], PATTERNS[name], PENALTIES)
    ours = refined(given[0], given[1], found, given[2], ridge)
    return [loss(pruned, weight, gram) for pruned in (ours, sparsegpt, wanda)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_errs_less_than_sparsegpt_and_sparsegpt_less_than_wanda(dtype, device):
    for name, choose, stride in (
        ("rows", lowest_half, None),
        ("2:4", lambda score: lowest_half(score, 4), 4),
    ):
        ours, sparsegpt, wanda = errors(name, choose, stride, dtype, device)
        assert ours < 0.85 * sparsegpt < 0.85 * wanda


def test_float32_is_as_good_as_float64(device):
    single, double = (
        errors("rows", lowest_half, None, dtype, device)[0]
        for dtype in (torch.float32, torch.float64)
    )
    assert single <= 1.01 * double


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_everything_may_stay_it_does_to_the_bit(dtype, device):
    weight, gram = correlated(5, 48, device=device, dtype=dtype)
    scale = unit_scale(gram, 0.001 * mean_diagonal(gram))
    target = weight * scale
    assert torch.equal(admm(target, gram, scale, PATTERNS["everything"], PENALTIES), target)
    assert not admm(target, gram, scale, PATTERNS["nothing"], PENALTIES).any()


def test_a_slice_of_rows_is_solved_as_within_all(device):
    weight, gram = correlated(33, 64, device=device)
    scale = unit_scale(gram, 0.001 * mean_diagonal(gram))
    whole = admm(weight * scale, gram, scale, ROWS, PENALTIES)
    parts = [
        admm(weight[rows] * scale, gram, scale, ROWS, PENALTIES)
        for rows in (slice(0, 5), slice(5, 33))
    ]
    assert torch.equal(torch.cat(parts) != 0, whole != 0)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-9)


def test_equal_penalties_share_an_inverse(monkeypatch, device):
    weight, gram = correlated(3, 16, device=device)
    module, calls = sys.modules["prunekit_kernels.admm"], []
    invert = module.invert_factored
    monkeypatch.setattr(module, "invert_factored", lambda lower: calls.append(1) or invert(lower))
    scale = unit_scale(gram, 0.01 * mean_diagonal(gram))
    admm(weight, gram, scale, ROWS, [0.1, 0.1, 0.2, 0.2, 0.1])
    assert len(calls) == 3


def test_leaves_its_inputs_alone(device):
    weight, gram = correlated(3, 16, device=device)
    scale = unit_scale(gram, 0.01 * mean_diagonal(gram))
    copies = [tensor.clone() for tensor in (weight, gram, scale)]
    admm(weight, gram, scale, ROWS, PENALTIES)
    assert all(map(torch.equal, (weight, gram, scale), copies))


def test_allocates_three_weights_and_one_gram_matrix(device):
    weight, gram = correlated(256, 512, device=device, dtype=torch.float32)
    scale = unit_scale(gram, 0.01 * mean_diagonal(gram))

    def zero(x, dual):
        x.zero_()

    most = peak_bytes(lambda: admm(weight, gram, scale, zero, [0.1, 0.2]))
    whole = 3 * weight.nbytes + gram.nbytes
    # On a GPU panels of the inverse, and what the library works in.
    assert whole <= most <= 1.02 * (whole + (gram.nbytes if gram.is_cuda else 0))


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_refuses_what_is_no_gram_matrix(value, device):
    gram = torch.tensor([[1.0, 3 * value], [3 * value, 1.0]], device=device)
    scale = torch.ones(2, device=device)
    with pytest.raises(ArithmeticError, match="not positive definite"):
        admm(torch.ones(1, 2, device=device), gram, scale, ROWS, [0.1])


def test_dead_inputs_have_the_scale_of_one(device):
    gram = torch.diag(torch.tensor([4.0, 0.0], device=device))
    torch.testing.assert_close(unit_scale(gram, 0.0), torch.tensor([2.0, 1.0], device=device))


def test_only_the_search_may_be_less_precise(monkeypatch, device):
    """Inverses and the caller's products are not."""
    weight, gram = correlated(3, 16, device=device)
    module, seen = sys.modules["prunekit_kernels.admm"], []
    monkeypatch.setattr(_precision, "SEARCH", "tf32")

    def look(name):
        real = getattr(module.torch, name)

        def call(*given, **options):
            switch, key, _ = _precision._switches("tf32", "ieee")[0]
            seen.append((name, getattr(switch, key)))
            return real(*given, **options)

        return call

    patched = SimpleNamespace(**{**vars(torch), "addmm": look("addmm"), "sub": look("sub")})
    monkeypatch.setattr(module, "torch", patched)
    switch, key, narrow = _precision._switches("tf32", "ieee")[0]
    before, exact = getattr(switch, key), _precision._switches("ieee", "ieee")[0][2]
    admm(weight, gram, unit_scale(gram, 0.01), ROWS, [0.1, 0.2])
    assert {(name, value) for name, value in seen} == {("addmm", narrow), ("sub", exact)}
    assert getattr(switch, key) == before
