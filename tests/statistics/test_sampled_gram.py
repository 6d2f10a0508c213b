"""The sampled Gram matrix: no other statistic is derived from it."""

import torch

from prunekit.statistics import ColumnEnergy, Gram, SampledGram, StageStatistics, minimal_union
from tests.support.statistics import accumulate, inputs


def test_it_is_gathered_of_every_fourth_sample():
    assert SampledGram.sample_stride == 4
    assert Gram.sample_stride == ColumnEnergy.sample_stride == 1


def test_it_is_found_as_a_gram_matrix_and_gives_no_column_energy():
    x = inputs(9, 5, 0)
    sampled = accumulate(SampledGram, x)
    assert torch.equal(StageStatistics([sampled])[Gram].full, x.T @ x)
    assert sampled.derive(ColumnEnergy) is None
    assert minimal_union([SampledGram, ColumnEnergy]) == (ColumnEnergy, SampledGram)
