"""Blocks of layers for tests of allocations."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

from prunekit.methods.layer import Layer
from prunekit.patterns import parse
from prunekit.statistics import ColumnEnergy, StageStatistics

seeds = st.integers(0, 1 << 30)
law = settings(deadline=None, max_examples=25)


def layer(name, weight, x=None):
    energy = ColumnEnergy(weight.shape[1])
    energy.update(torch.ones(1, weight.shape[1]) if x is None else x)
    return Layer(name, weight, StageStatistics([energy]), parse("unstructured", "layer"), 0.0)


def blocks_of(*shapes, seed=0, values=None):
    """Return one block of two layers for each shape."""
    generator = torch.Generator().manual_seed(seed)

    def weight(outputs, inputs):
        if values:
            return torch.randint(-values, values + 1, (outputs, inputs), generator=generator) / 4
        return torch.randn(outputs, inputs, generator=generator)

    return [
        [layer(f"{i}.{j}", weight(outputs, inputs)) for j in range(2)]
        for i, (outputs, inputs) in enumerate(shapes)
    ]


def sizes(blocks):
    return {layer.name: layer.weight.numel() for block in blocks for layer in block}


def allocate(allocation, blocks, sparsity):
    return allocation.allocate(sizes(blocks), lambda: iter(blocks), sparsity)


def flat(blocks):
    return [layer for block in blocks for layer in block]
