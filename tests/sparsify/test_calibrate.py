"""Statistics by stage see pruned earlier stages; by block, none."""

import pytest
import torch

from prunekit.models.sequential.context import Context
from tests.support.architectures import tiny
from tests.support.blocks import pruning

pytestmark = pytest.mark.usefixtures("small_batches")


def test_by_stage_the_next_stage_reads_what_the_pruned_ones_give(ids):
    """With sparsity 1, by stage the second stage reads zeros; by block not."""

    def energies(propagation):
        model = tiny("llama")
        recipe = {"method": "wanda", "propagation": propagation, "pattern": "unstructured"}
        return {
            outcome.as_record()["name"].rpartition(".")[2]: outcome.as_record()["relative_error"]
            for *_, outcomes in pruning(model, ids, sparsity=1.0, **recipe)
            for outcome in outcomes
        }

    assert energies("stage")["o_proj"] == 0
    assert energies("block")["o_proj"] == pytest.approx(1)


@pytest.mark.parametrize("propagation", ["block", "stage"])
def test_the_next_block_reads_what_the_pruned_one_gives(propagation, ids):
    model = tiny("llama")
    last = None
    for visit, _, outcomes in pruning(model, ids, propagation=propagation, pattern="2:4"):
        if last is not None:
            for mine, theirs in zip(visit.hidden, last, strict=True):
                assert torch.equal(mine, theirs)
        # By stage hidden states change on the way.
        bound = [
            visit.runner.bind(visit.index, hidden.clone(), Context()) for hidden in visit.hidden
        ]
        list(outcomes)
        with torch.inference_mode():
            last = [call() for call in bound]
