"""Which operations the engine's methods run."""

import pytest
import torch
from prunekit_kernels import _select, _select_keys
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("pydantic", reason="the engine needs pydantic, the kernels alone do not")

from prunekit.methods.admm import Admm
from prunekit.methods.alps import Alps
from prunekit.methods.layer import Layer
from prunekit.methods.magnitude import Magnitude
from prunekit.methods.ria import Ria
from prunekit.methods.wanda import Wanda
from prunekit.patterns import parse
from prunekit.statistics import ColumnEnergy, Gram, StageStatistics
from tests.kernels.cases import cases

METHODS = {method.name: method for method in (Magnitude(), Wanda(), Ria())}
PATTERNS = ["unstructured", "2:4", "4:8", "3:6", "block:4x4", "row", "column"]


def most_of(name, text):
    """Return whether another method tests the pattern, and another pattern the method."""
    return name not in {"ria", "admm"} and text != "unstructured"


class Recorded(TorchDispatchMode):
    """Lists the operations of prunekit that run."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("prunekit."):
            self.operations.append(str(function))
        return function(*args, **kwargs or {})


def layer(pattern, device):
    x = torch.randn(20, 24, device=device)
    energy = ColumnEnergy(24, device)
    energy.update(x)
    weight = torch.randn(8, 24, device=device)
    return Layer("a", weight, StageStatistics([energy]), pattern, 0.5)


@pytest.mark.parametrize(("name", "text"), cases(METHODS, PATTERNS, seldom=most_of))
def test_scores_and_masks_in_one_operation(name, text, device):
    method = METHODS[name]
    given = layer(parse(text, method.scope), device)
    with Recorded() as ran:
        pruned = method.prune(given)
    assert ran.operations == ["prunekit.score_and_mask.default"]
    keep = given.pattern.keep(method.score(given), 0.5)
    assert torch.equal(pruned.keep, keep)
    assert torch.equal(pruned.weight, given.weight.where(keep, 0))


@pytest.mark.parametrize("statistic", [ColumnEnergy, Gram], ids=lambda kind: kind.name)
def test_statistics_add_in_one_operation(statistic, device):
    found = statistic(24, device)
    with Recorded() as ran:
        found.update(torch.randn(20, 24, device=device))
    assert ran.operations == [f"prunekit.{statistic.name}.default"]


@pytest.mark.parametrize(
    ("ranker", "operation"),
    [("entropy", "attention_entropy"), ("salience", "salience"), ("obs", "gram")],
)
def test_rankers_look_through_our_operations(ranker, operation, device):
    pytest.importorskip("transformers", reason="rankers look at models")
    import prunekit
    from tests.support.units import batch, randomized_model

    model = randomized_model("llama").to(device)
    given = {name: part.to(device) for name, part in batch(model).items()}
    gates = prunekit.heads(model)
    with Recorded() as ran:
        gates.score(ranker, [given])
    gates.detach()
    assert set(ran.operations) == {f"prunekit.{operation}.default"}
    assert len(ran.operations) >= len(gates.linear_groups)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("name", "text"), cases(METHODS, ["unstructured", "2:4", "3:6", "block:4x4"], seldom=most_of)
)
def test_its_kernels_run_where_triton_does(name, text, device, monkeypatch):
    method = METHODS[name]
    launch, launched = _select.launch, []

    def counted(source, groups):
        launched.append(groups)
        return launch(source, groups)

    monkeypatch.setattr(_select, "launch", counted)
    method.prune(layer(parse(text, method.scope), device))
    assert len(launched) == 1


SOLVERS = {solver.name: solver for solver in (Admm(iterations=3), Alps(most_iterations=3))}


def with_gram(text, device):
    given = layer(parse(text, "layer"), device)
    gram = Gram(24, device)
    gram.update(torch.randn(200, 24, device=device))
    return Layer("a", given.weight, StageStatistics([gram]), given.pattern, given.sparsity)


@pytest.mark.parametrize(("name", "text"), cases(SOLVERS, PATTERNS, seldom=most_of))
def test_solvers_project_in_one_operation(name, text, device):
    with Recorded() as ran:
        pruned = SOLVERS[name].prune(with_gram(text, device))
    tiles = text in ("block:4x4", "row", "column")
    projected = ran.operations.count("prunekit.project_in_place.default")
    assert projected == (0 if tiles else 1 + 3)
    assert ran.operations[-1] == "prunekit.pcg.default"
    assert not pruned.weight[~pruned.keep].any()


@pytest.mark.interpret
@pytest.mark.parametrize("name", SOLVERS)
def test_their_projection_is_a_kernel_where_triton_runs(name, device, monkeypatch):
    launch, launched = _select.launch, []

    def counted(source, groups):
        launched.append(source.kind)
        return launch(source, groups)

    monkeypatch.setattr(_select, "launch", counted)
    SOLVERS[name].prune(with_gram("unstructured", device))
    assert launched == 4 * [_select_keys.DUAL]
