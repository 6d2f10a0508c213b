"""n:m masks: exact groups, shapes, violations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit.errors import ConfigError
from prunekit.patterns import parse
from prunekit.patterns.n_of_m import NOfM
from tests.support.patterns import law, without_lowest


@pytest.mark.parametrize("m", range(2, 33))
def test_n_of_m_keeps_the_n_highest_of_every_m(m):
    generator = torch.Generator().manual_seed(m)
    score = torch.randint(0, m, (5, 3 * m), generator=generator).float()
    score[0, 0], score[1, m], score[2, 2 * m - 1] = math.nan, math.inf, math.nan
    for n in range(1, m):
        keep = NOfM(n, m).keep(score, 0.0)
        expected = torch.cat([without_lowest(g, m - n) for g in score.view(-1, 1, m)])
        assert torch.equal(keep.view(-1, m), expected)


def test_n_of_m_of_all_nan_keeps_n():
    keep = NOfM(2, 4).keep(torch.full((3, 8), math.nan), 0.0)
    assert keep.tolist() == [[True, True, False, False] * 2] * 3


@law
@given(st.integers(2, 64), st.data())
def test_n_of_m_fixes_its_sparsity(m, data):
    n = data.draw(st.integers(1, m - 1))
    pattern = parse(f"{n}:{m}")
    assert pattern.sparsity == pytest.approx(1 - n / m)
    assert pattern.stride == m
    assert pattern.name == f"{n}:{m}"


def test_n_of_m_chosen_group_by_group_is_the_whole_mask():
    score = torch.rand(4, 24, generator=torch.Generator().manual_seed(0))
    pattern = NOfM(3, 8)
    parts = [pattern.keep_columns(score[:, at : at + 8], at, 0.0) for at in range(0, 24, 8)]
    assert torch.equal(torch.cat(parts, 1), pattern.keep(score, 0.0))


def test_ten_inputs_do_not_fit_two_of_four():
    assert (
        NOfM(2, 4).why_not_applicable(7, 10)
        == "2:4 needs a multiple of 4 inputs, this layer has 10"
    )
    assert NOfM(2, 4).why_not_applicable(7, 12) is None
    with pytest.raises(ValueError, match="neighbours have to divide it"):
        NOfM(2, 4).keep(torch.rand(3, 10), 0.0)


def test_groups_that_keep_more_than_n_are_counted():
    keep = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]]).bool()
    assert NOfM(2, 4).violations(keep) == 2
    assert NOfM(4, 8).violations(keep) == 1
    assert NOfM(1, 2).violations(keep) == 4


@pytest.mark.parametrize("text", ["0:4", "4:2", "4:4", "0:0", "3:65"])
def test_n_and_m_that_make_no_sense_are_refused(text):
    with pytest.raises(ConfigError, match=f'pattern "{text}": n:m keeps n of every m'):
        parse(text)
