"""Weights of linears as parts of parameters: plain, transposed, and of experts."""

import pytest
import torch

from prunekit.models.experts import unfused
from prunekit.training.gradual import GradualPruner
from prunekit.training.weight_views import weight_places
from tests.support.architectures import tiny


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_the_views_are_the_weights_that_are_pruned(model_type):
    model = tiny(model_type)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = GradualPruner(model, optimizer, sparsity=0.5, end=1)
    with unfused(model):
        for name, view in pruner._views.items():
            linear = model.get_submodule(name)
            stored = linear.weight.T if view.transposed else linear.weight
            assert torch.equal(view.matrix, stored)
            assert view.matrix.data_ptr() == linear.weight.data_ptr()
    for number, view in enumerate(pruner._views.values()):
        keep = torch.rand(view.matrix.shape, generator=torch.Generator().manual_seed(number)) > 0.5
        view.set_keep(pruner.masks, keep)
        assert torch.equal(view.keep(pruner.masks), keep)
    pruner.masks.apply()
    for number, view in enumerate(pruner._views.values()):
        keep = torch.rand(view.matrix.shape, generator=torch.Generator().manual_seed(number)) > 0.5
        assert torch.equal(view.matrix != 0, keep)


def test_places_are_the_matrices_of_a_model_each_once():
    model = tiny("t5")
    places = weight_places(model)
    parameters = [place.parameter for place in places.values()]
    assert len(parameters) == len({*parameters})
    assert {*parameters} == {each for each in model.parameters() if each.ndim > 1}
