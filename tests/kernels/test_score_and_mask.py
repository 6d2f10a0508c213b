import pytest
import torch
from prunekit_kernels import Groups, score_and_mask, unpack
from prunekit_kernels.score_and_mask import _score_and_mask, score, score_and_mask_reference

from tests.kernels.cases import cases
from tests.kernels.selections import EASY, GROUPS, INPUTS, OUTPUTS, PATHS, hard_scores

COMBINED = cases(EASY, GROUPS, seldom=lambda kind, name: kind == "equal" and name not in PATHS)
FACTORS = {
    "magnitude": (False, False),
    "wanda": (True, False),
    "ria": (True, True),
    "shares alone": (False, True),
}


def factors(name, shape, device, dtype=torch.float32):
    scaled, shared = FACTORS[name]
    generator = torch.Generator().manual_seed(0)
    scale, row, column = (
        torch.rand(size, generator=generator, dtype=dtype).to(device)
        for size in (shape[1], *shape)
    )  # fmt: skip
    return scale if scaled else None, (row, column) if shared else None


def check(weight, groups, given):
    expected, keep = score_and_mask_reference(weight.clone(), groups, *given)
    bits = score_and_mask(weight, groups, *given)
    assert torch.equal(weight, expected)
    assert torch.equal(unpack(bits, weight.shape[1]), keep)
    assert not torch.signbit(weight[~keep]).any()


@pytest.mark.parametrize(("kind", "name"), COMBINED)
def test_zeroes_what_sorting_chooses(kind, name, device):
    weight = hard_scores(kind, (OUTPUTS, INPUTS), device)
    check(weight, GROUPS[name], factors("ria", weight.shape, device))


@pytest.mark.parametrize(
    ("name", "method", "kind"),
    cases(
        PATHS,
        FACTORS,
        ["bfloat16", "float16", "float64"],
        seldom=lambda name, method, kind: method != "ria" and (name, kind) != ("row", "bfloat16"),
    ),
)
def test_any_method_in_any_float_type(name, method, kind, device):
    dtype = getattr(torch, kind)
    weight = hard_scores("normal", (OUTPUTS, INPUTS), device).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    check(weight, GROUPS[name], factors(method, weight.shape, device, wide))


@pytest.mark.parametrize("name", ["row", "layer", "4:8", "3:10", "tiles", "rows", "columns"])
def test_any_strides(name, device):
    weight = torch.randn(INPUTS, 2 * OUTPUTS, device=device).T[::2]
    check(weight, GROUPS[name], factors("wanda", weight.shape, device))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_large_and_tiny_magnitudes(scale, device):
    weight = torch.randn(OUTPUTS, INPUTS, device=device) * scale
    for name in ("row", "layer", "2:4", "tiles", "columns"):
        check(weight.clone(), GROUPS[name], factors("wanda", weight.shape, device))


def test_scores_are_the_formula(device):
    weight = torch.randn(4, 6, device=device)
    scale, shares = factors("ria", weight.shape, device)
    exact = weight.double().abs() * (shares[0].double()[:, None] + shares[1]) * scale
    torch.testing.assert_close(score(weight, scale, shares).double(), exact, rtol=1e-6, atol=0)


def test_same_bits_each_time(device):
    weight = torch.randn(9, 64, device=device).bfloat16()
    for groups in (Groups(None, None, (200,)), Groups(1, None, (30,))):
        first, second = weight.clone(), weight.clone()
        assert torch.equal(score_and_mask(first, groups), score_and_mask(second, groups))
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_of_nothing_nothing_is_chosen(shape, device):
    bits = score_and_mask(torch.zeros(shape, device=device), Groups(1, None, (0,)))
    assert bits.shape == (shape[0], -(-shape[1] // 8))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"scale": torch.ones(3)}, r"scale must be torch.float32 of shape \(8,\)"),
        ({"scale": torch.ones(8).double()}, "scale must be torch.float32"),
        ({"shares": (torch.ones(8), torch.ones(8))}, r"row must be torch.float32 of shape \(4,\)"),
        ({"scale": torch.ones(8, device="meta")}, "on cpu, got torch.float32"),
        ({"groups": Groups(1, 3, (1,))}, "neighbours have to divide it"),
    ],
)
def test_refuses_what_does_not_fit(given, reason):
    given = {"groups": Groups(1, None, (4,))} | given
    with pytest.raises(ValueError, match=reason):
        score_and_mask(torch.ones(4, 8), **given)


def test_refuses_integers():
    with pytest.raises(ValueError, match="of a float type, got"):
        score_and_mask(torch.ones(4, 8).long(), Groups(1, None, (4,)))


@pytest.mark.parametrize(
    "name", cases(["row", "layer", "2:4", "tiles"], seldom=lambda name: name != "2:4")
)
def test_is_a_proper_op(name, device):
    weight = torch.randn(OUTPUTS, INPUTS, device=device)
    scale, (row, column) = factors("ria", weight.shape, device)
    torch.library.opcheck(_score_and_mask, (weight, GROUPS[name].numbers(), scale, row, column))


def test_compiles_without_graph_break(device):
    weight = torch.randn(OUTPUTS, INPUTS, device=device)
    expected, _ = score_and_mask_reference(weight, GROUPS["row"])
    torch.compile(score_and_mask, backend="aot_eager", fullgraph=True)(weight, GROUPS["row"])
    assert torch.equal(weight, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 11008), (512, 28672)], ids=str)
def test_real_sizes(shape, dtype, device):
    weight = torch.randn(shape, device=device).to(dtype)
    for groups in (
        Groups(1, None, (shape[1] // 2,)),
        Groups(None, None, (weight.numel() // 2,)),
        Groups(1, 4, (2,)),
        Groups(1, 8, (4,)),
        Groups(1, 16, (8,)),
    ):
        check(weight.clone(), groups, factors("ria", shape, device))
