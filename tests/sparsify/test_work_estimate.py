"""Estimated operations and traffic: closed forms, sums over ranks."""

import pytest
import torch

from prunekit.config.prune_table import Prune
from prunekit.distributed.ranks import Ranks
from prunekit.models.layout import Block, Linear
from prunekit.sparsify.recipe import Recipe
from prunekit.sparsify.work_estimate import (
    CostInputs,
    block_runs,
    estimate_traffic,
    estimate_work,
    max_rows,
    row_flops,
)


def block(name):
    up, down = Linear(f"{name}.up", "up", 32, 16), Linear(f"{name}.down", "down", 16, 32)
    return Block(name, ((up,), (down,)))


BLOCKS = [block("m.0"), block("m.1")]
STORED = {linear.name: torch.float32 for block in BLOCKS for linear in block.linears}


def recipe(**section):
    section = {"method": "sparsegpt", "pattern": "2:4", **section}
    return Recipe.of(Prune.model_validate(section), calibrated=True)


def costs(size=1, samples=4):
    return CostInputs(torch.device("cpu"), torch.float32, STORED, (samples, 8), Ranks(0, size))


def test_a_forward_costs_two_operations_a_weight_and_attention():
    once = 2 * 32 * 2 * (2 * 32 * 16) + 2 * 32 * 8 * (16 + 16)
    found = estimate_work(BLOCKS, recipe(propagation="block"), costs())
    assert found.forward == block_runs(recipe(propagation="block")) * once
    dense = recipe(propagation="block", target="dense")
    assert estimate_work(BLOCKS, dense, costs()).forward == 2 * found.forward


def test_gathering_is_linear_in_tokens():
    few, many = (estimate_work(BLOCKS, recipe(), costs(samples=n)).gather for n in (2, 6))
    assert many == 3 * few


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_the_operations_of_rows(size):
    method = {"method": "wanda", "measure_error": False}
    one = estimate_work(BLOCKS, recipe(**method), costs()).solve
    several = estimate_work(BLOCKS, recipe(**method), costs(size)).solve
    assert len(several) == size
    assert sum(several) == sum(one)
    assert max_rows(BLOCKS[0].linears[0], recipe(), costs(size)) == 32 // size


def test_refining_costs_products_with_the_gram_matrix():
    plain, refined = (row_flops(recipe(refine=refine), 32, 16) for refine in (None, "pcg"))
    assert (refined - plain) % (32 * 16**2) == 0
    assert refined > plain


def test_a_rank_alone_sends_nothing():
    assert not any(estimate_traffic(BLOCKS, recipe(), costs()).values())
    sent = estimate_traffic(BLOCKS, recipe(), costs(2))
    assert all(sent.values())
    assert sent["rows"] == 2 * (16 * 16 + 8 * 32) * 4
