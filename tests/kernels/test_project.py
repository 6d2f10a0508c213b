import pytest
import torch
from prunekit_kernels import project, unpack
from prunekit_kernels.project import _project, _project_in_place, project_reference
from prunekit_kernels.selection import choose_reference

from tests.kernels.cases import cases
from tests.kernels.selections import EASY, GROUPS, INPUTS, OUTPUTS, PATHS, hard_scores
from tests.support.closeness import assert_close

RHO = 1.7
COMBINED = cases(EASY, GROUPS, seldom=lambda kind, name: kind == "equal" and name not in PATHS)


def pair(kind, device):
    x = hard_scores(kind, (OUTPUTS, INPUTS), device)
    dual = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1)).to(device)
    return x, dual if kind == "normal" else dual.round()


@pytest.mark.parametrize(("kind", "name"), COMBINED)
def test_is_the_threshold_and_the_dual_update(kind, name, device):
    groups = GROUPS[name]
    x, dual = pair(kind, device)
    out = torch.empty_like(x)
    plain, plain_dual = project_reference(x, dual, RHO, groups)
    _, exact_dual = project_reference(x.double(), dual.double(), RHO, groups)
    target = x + dual * (1 / RHO)
    bits = project(x, dual, RHO, groups, out)
    assert torch.equal(out, plain)
    keep = unpack(bits, INPUTS)
    assert torch.equal(keep, choose_reference(target.abs(), groups))
    assert torch.equal(out, target.where(keep, 0))
    assert not dual[keep].any()
    if kind == "normal":
        assert_close(dual, exact_dual, plain_dual)


@pytest.mark.parametrize("name", PATHS)
def test_may_write_over_its_input(name, device):
    x, dual = pair("normal", device)
    apart, expected = dual.clone(), torch.empty_like(x)
    project(x, apart, RHO, GROUPS[name], expected)
    project(x, dual, RHO, GROUPS[name], x)
    assert torch.equal(x, expected)
    assert torch.equal(dual, apart)


@pytest.mark.parametrize("name", PATHS)
def test_any_strides(name, device):
    x, dual = pair("normal", device)
    plain, _ = project_reference(x, dual, RHO, GROUPS[name])
    out = torch.zeros(OUTPUTS, 2 * INPUTS, device=device)[:, ::2]
    project(x.T.contiguous().T, dual, RHO, GROUPS[name], out)
    assert torch.equal(out, plain)


def test_float64(device):
    x, dual = (part.double() for part in pair("normal", device))
    plain, plain_dual = project_reference(x, dual, RHO, GROUPS["row"])
    out = torch.empty_like(x)
    project(x, dual, RHO, GROUPS["row"], out)
    assert torch.equal(out, plain)
    torch.testing.assert_close(dual, plain_dual, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "rho", "out", "reason"),
    [
        (torch.ones(4, 8), 0.0, torch.ones(4, 8), "rho positive"),
        (torch.ones(4, 8), 1.0, torch.ones(4, 7), "out must be torch.float32 of shape"),
        (
            torch.ones(4, 8).half(),
            1.0,
            torch.ones(4, 8).half(),
            "must be float32 or float64 and rho positive, got torch.float16",
        ),
    ],
)
def test_refuses_what_does_not_fit(x, rho, out, reason):
    with pytest.raises(ValueError, match=reason):
        project(x, torch.ones(4, 8, dtype=x.dtype), rho, GROUPS["2:4"], out)


@pytest.mark.parametrize("name", cases(["row", "layer", "2:4"], seldom=lambda name: name != "2:4"))
def test_is_a_proper_op(name, device):
    x, dual = pair("normal", device)
    numbers = GROUPS[name].numbers()
    torch.library.opcheck(_project, (x, dual, RHO, numbers, torch.zeros_like(x)))
    torch.library.opcheck(_project_in_place, (x, dual, RHO, numbers))


def test_compiles_without_graph_break(device):
    x, dual = pair("normal", device)
    plain, _ = project_reference(x, dual, RHO, GROUPS["row"])
    out = torch.empty_like(x)
    torch.compile(project, backend="aot_eager", fullgraph=True)(x, dual, RHO, GROUPS["row"], out)
    assert torch.equal(out, plain)
