"""Observed inputs: NaN and inf are located, forwards end early."""

import pytest
import torch

import prunekit
from prunekit.architectures import find_architecture
from prunekit.errors import NumericsError
from prunekit.models.layout import stack_runners
from prunekit.models.sequential.pipeline import split_batches
from tests.support.architectures import tiny
from tests.support.blocks import HALF, all_records

pytestmark = pytest.mark.usefixtures("small_batches")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("propagation", ["block", "stage"])
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "t5", "bert"])
def test_an_activation_that_is_nan_names_layer_and_sample(model_type, propagation, value, ids):
    model = tiny(model_type)
    ids[4, 3] = 77
    with torch.no_grad():
        model.get_input_embeddings().weight[77, 5] = value
    with pytest.raises(NumericsError) as caught:
        prunekit.prune(model, ids, method="wanda", propagation=propagation, **HALF)
    first = find_architecture(model).stacks[0].stages[0].linears[0]
    name = f"{stack_runners(model, find_architecture(model))[0].names[0]}.{first}"
    assert str(caught.value) == f"{name}: its input is NaN or inf in calibration sample 4."


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@pytest.mark.parametrize("propagation", ["block", "stage"])
def test_an_activation_that_overflows_within_a_block_names_layer_and_sample(
    model_type, propagation, ids
):
    model = tiny(model_type)
    path = {"llama": "mlp.down_proj", "opt": "fc2"}[model_type]
    block = stack_runners(model, find_architecture(model))[0].blocks[0]
    hit = block.get_submodule({"llama": "mlp.act_fn", "opt": "activation_fn"}[model_type])

    def blow(_, args, out):
        """Set the first sample of the batch of two to inf."""
        flat = out.reshape(-1, out.shape[-1]).clone()
        if len(flat) == 2 * ids.shape[1]:
            flat[: ids.shape[1]] = torch.inf
        return flat.view_as(out)

    hit.register_forward_hook(blow)
    with pytest.raises(NumericsError, match=rf"0.{path}: its input .* calibration sample 4\.$"):
        prunekit.prune(model, ids, method="wanda", propagation=propagation, **HALF)


def test_a_forward_that_shows_a_stage_ends_there(ids):
    """By stage, the feed-forward runs for its own two stages and to propagate.

    And twice on one sample, to see how the block uses the output of attention.
    """
    model, calls = tiny("llama"), []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(0))
    all_records(model, ids, method="sparsegpt", propagation="stage", **HALF)
    assert len(calls) == 3 * len(split_batches(ids, torch.device("cpu"))) + 2
