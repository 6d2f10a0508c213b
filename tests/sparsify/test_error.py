"""The relative error equals that of the outputs in float64."""

import pytest
import torch

import prunekit
from prunekit.models.layout import read_weight
from prunekit.sparsify.error import ENERGY_PANEL, relative_error
from prunekit.statistics import Gram, StageStatistics
from tests.support.architectures import tiny
from tests.support.blocks import pruning

pytestmark = pytest.mark.usefixtures("small_batches")


def exact_error(inputs, dense, pruned):
    """Return ‖WX − W′X‖² / ‖WX‖² in float64."""
    x = torch.cat([part.flatten(0, -2) for part in inputs]).double()
    dense, pruned = dense.double(), pruned.double()
    return float((x @ (dense - pruned).T).square().sum() / (x @ dense.T).square().sum())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5"])
def test_relative_error_is_that_of_the_outputs(model_type, method, ids):
    """By block, inputs are those of the dense block after pruned blocks.

    A method that needs no Gram matrix is judged by one sample in four.
    """
    model = tiny(model_type)
    checked = 0
    section = {"method": method, "pattern": "2:4", "propagation": "block"}
    for visit, block, outcomes in pruning(model, ids, **section):
        inputs, dense, hooks = {}, {}, []
        for linear in block.linears:
            module = visit.module.get_submodule(linear.path)
            dense[linear] = read_weight(visit.module, linear)
            inputs[linear] = []
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, into=inputs[linear]: into.append(args[0])
                )
            )
        visit.run()
        for hook in hooks:
            hook.remove()
        for outcome in outcomes:
            linear = outcome.linear
            looked = [torch.cat(inputs[linear])[:: 4 if method == "wanda" else 1]]
            expected = exact_error(looked, dense[linear], read_weight(visit.module, linear))
            assert outcome.as_record()["relative_error"] == pytest.approx(expected, rel=1e-4)
            checked += 1
    assert checked >= 8


def test_no_error_is_reported_where_no_gram_matrix_was_gathered(ids):
    entries = prunekit.prune(tiny("llama"), ids, method="wanda", pattern="2:4", measure_error=False)
    assert {entry["relative_error"] for entry in entries} == {None}
    assert relative_error(torch.ones(2, 2), torch.ones(2, 2), StageStatistics([])) is None
    gram = Gram(2)
    assert relative_error(torch.ones(2, 2), torch.zeros(2, 2), StageStatistics([gram])) is None
    gram.update(torch.zeros(1, 2))
    assert relative_error(torch.ones(2, 2), torch.zeros(2, 2), StageStatistics([gram])) == 0.0


def test_panels_change_nothing_but_rounding():
    generator, inputs = torch.Generator().manual_seed(0), 2 * ENERGY_PANEL + 7
    dense = torch.randn(5, inputs, generator=generator)
    pruned = dense + 0.1 * torch.randn(5, inputs, generator=generator)
    x, gram = torch.randn(60, inputs, generator=generator), Gram(inputs)
    gram.update(x)
    found = relative_error(dense, pruned, StageStatistics([gram]))
    assert found == pytest.approx(exact_error([x], dense, pruned), rel=1e-4)
