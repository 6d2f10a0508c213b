"""Bias compensation of removed units: b + W_P E[x_P], as in FLAP."""

import torch

from prunekit.models.orientation import weight_matrix
from prunekit.models.units.heads_neurons import linear_groups
from prunekit.structured.blockwise_refit import compensate
from tests.support.units import randomized_model


def test_a_bias_takes_the_mean_of_what_goes_in_each_layer_after_those_before_it():
    """Each reading linear keeps its mean output, and removed columns are 0."""
    model = randomized_model("gpt2")
    ids = torch.randint(3, 96, (4, 9), generator=torch.Generator().manual_seed(3))
    found = [*linear_groups(model, "heads"), *linear_groups(model, "neurons")]
    kept = {site.name: range(1, site.units) for site in found}
    before = {
        site.name: (
            weight_matrix(site.reader.linear).clone(),
            site.reader.linear.bias.detach().clone(),
        )
        for site in found
    }
    assert len(list(compensate(model, found, kept, [{"input_ids": ids}], "bias"))) == 2
    read = {}
    handles = [
        site.reader.linear.register_forward_pre_hook(
            lambda _, x, name=site.name: read.update({name: x[0].flatten(0, -2)})
        )
        for site in found
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    for site in found:
        weight, bias = before[site.name]
        gone = site.reader.index[:1].flatten()
        linear, mean = site.reader.linear, read[site.name].mean(0)
        assert not weight_matrix(linear)[:, gone].any()
        torch.testing.assert_close(linear.bias, bias + weight[:, gone] @ mean[gone])
        kept_columns = site.reader.index[1:].flatten()
        assert torch.equal(weight_matrix(linear)[:, kept_columns], weight[:, kept_columns])
        assert not torch.equal(linear.bias, bias)
