"""Selection of units to prune: exact counts, and no empty layer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit.errors import ConfigError
from prunekit.models.units.find import unit_groups
from prunekit.structured.selection import (
    check_some_pruned,
    fewest_units,
    select_units,
    unit_count,
)
from tests.support.architectures import tiny


def scores(*layers):
    return {f"layer {i}": torch.tensor(layer).double() for i, layer in enumerate(layers)}


def all_kept(found):
    return {name: torch.ones(len(score), dtype=torch.bool) for name, score in found.items()}


def test_takes_the_lowest_over_all_layers_lowest_first():
    found = scores([1, 5, 2], [4, 0, 3])
    assert select_units(found, all_kept(found), 0.5) == [(1, 1, 0), (0, 0, 1), (0, 2, 2)]


def test_takes_the_same_part_of_each_layer():
    found = scores([1, 2, 3, 4], [7, 8, 5, 6])
    chosen = select_units(found, all_kept(found), 0.5, scope="layer")
    assert [unit[:2] for unit in chosen] == [(0, 0), (0, 1), (1, 2), (1, 3)]


def test_of_equal_scores_the_lower_index_stays():
    found = scores([1, 1, 1], [1, 1, 1])
    assert [unit[:2] for unit in select_units(found, all_kept(found), 0.5)] == [
        (1, 2),
        (1, 1),
        (0, 2),
    ]


@given(
    layers=st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=6), min_size=1, max_size=5),
    sparsity=st.floats(0, 0.99),
)
def test_the_count_is_exact_and_every_layer_keeps_one(layers, sparsity):
    """The count is exact and every layer keeps a unit, or refused."""
    found = scores(*layers)
    total = sum(map(len, layers))
    wanted = int(sparsity * total + 0.5)
    if wanted > total - len(layers):
        with pytest.raises(ConfigError, match="Ask for less"):
            select_units(found, all_kept(found), sparsity)
        return
    chosen = select_units(found, all_kept(found), sparsity)
    assert len({unit[:2] for unit in chosen}) == len(chosen) == wanted
    for layer, units in enumerate(layers):
        assert sum(unit.layer == layer for unit in chosen) < len(units)


def test_counts_what_is_gone_already():
    found = scores([1, 2, 3, 4])
    keep = {"layer 0": torch.tensor([False, True, True, True])}
    assert select_units(found, keep, 0.5) == [(0, 1, 2)]
    with pytest.raises(ConfigError, match="1 units more than that are pruned already"):
        select_units(found, keep, 0.0)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_refuses_what_is_no_part_of_the_units(sparsity):
    found = scores([1, 2])
    with pytest.raises(ConfigError, match="is not from 0 up to, but without, 1"):
        select_units(found, all_kept(found), sparsity)


def test_refuses_scores_that_are_no_number():
    found = scores([1, float("nan")])
    with pytest.raises(ConfigError, match="layer 0: the score of unit 1 is not a number"):
        select_units(found, all_kept(found), 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "x"}, "sparsity: 'x' is not from 0"),
        ({"sparsity": None}, "sparsity: None is not from 0"),
        ({"sparsity": math.nan}, "sparsity: nan is not from 0"),
        ({"scope": "x"}, "scope: 'x' is none. Choose: global, layer"),
        ({"least": 1.5}, "least: 1.5 is not a whole number of at least 0"),
        ({"least": True}, "least: True is not a whole number"),
        ({"scores": None}, "scores: layer 0 needs a tensor with 3 values"),
        ({"scores": {}}, "scores: layer 0 needs a tensor with 3 values"),
        ({"scores": {"layer 0": [1, 2, 3]}}, "scores: layer 0 needs a tensor"),
        ({"scores": scores([1, 2])}, "scores: layer 0 needs a tensor with 3 values"),
    ],
)
def test_arguments_of_other_types_are_refused(options, message):
    found = scores([1, 5, 2])
    given = {"scores": found, "keep": all_kept(found), "sparsity": 0.5} | options
    with pytest.raises(ConfigError, match=message):
        select_units(**given)


def test_half_a_unit_counts_as_one_and_none_pruned_is_an_error():
    assert [unit_count(sparsity, 20) for sparsity in (0.0, 0.01, 0.025, 0.5)] == [0, 0, 1, 10]
    with pytest.raises(ConfigError, match=r"sparsity: of 20 heads 0\.01 prunes none"):
        check_some_pruned("sparsity", 0.01, 20, "heads", 0)
    check_some_pruned("sparsity", 0.0, 20, "heads", 0)
    check_some_pruned("sparsity", 0.01, 20, "heads", 1)


def test_a_layer_may_lose_all_units_but_not_the_model():
    found = scores([1, 2, 0], [4, 5, 3])
    chosen = select_units(found, all_kept(found), 0.5, least=0)
    assert [unit[:2] for unit in chosen] == [(0, 2), (0, 0), (0, 1)]
    with pytest.raises(ConfigError, match="all 6 units that are left"):
        select_units(found, all_kept(found), 0.95, least=0)
    with pytest.raises(ConfigError, match="all 6 units that are left"):
        select_units(found, all_kept(found), 0.9, least=0, scope="layer")
    with pytest.raises(ConfigError, match="least: -1 is not a whole number of at least 0"):
        select_units(found, all_kept(found), 0.5, least=-1)


def test_of_blocks_and_coordinates_one_is_kept_and_of_unknown_attentions_too():
    for kind in ("blocks", "hidden"):
        assert fewest_units(unit_groups(tiny("llama"), kind), 0) == 1
    assert fewest_units(unit_groups(tiny("llama"), "heads"), 0) == 0
    assert fewest_units(unit_groups(tiny("llama"), "heads"), 3) == 3
    granite = tiny("granite")
    with pytest.raises(ConfigError, match=r"GraniteAttention \(model\.layers\.0.*Use least = 1"):
        fewest_units(unit_groups(granite, "heads"), 0)
