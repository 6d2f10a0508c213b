"""Parameter budgets: the largest set of top-ranked units that fits, counted exactly."""

import pytest
import torch

import prunekit
from prunekit.errors import ConfigError
from prunekit.models.units.find import unit_groups
from prunekit.models.units.removal import apply_removal
from prunekit.models.units.stock_config import expressible_in_config, stock_entries
from prunekit.structured.parameter_budget import (
    BudgetConstraints,
    ParameterCounter,
    UnitOrder,
    select_within_budget,
)
from tests.support.architectures import tiny
from tests.support.units import DENSE_KINDS


def all_kept(found):
    return {place.name: torch.ones(place.units, dtype=torch.bool) for place in found}


def random_scores(found, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        place.name: torch.rand(place.units, generator=generator, dtype=torch.float64)
        * place.costs.mean()
        for place in found
    }


@pytest.mark.parametrize("model_type", ["gemma3_text", "llama", "phi3", "qwen2"])
def test_counts_what_is_left_of_the_model_to_the_last_parameter(model_type):
    """All kinds at once: removing a coordinate also shrinks each head."""
    model = tiny(model_type)
    whole = model.num_parameters()
    found = [place for kind in DENSE_KINDS for place in unit_groups(model, kind)]
    keep = {name: units.clone() for name, units in all_kept(found).items()}
    for place in found:
        keep[place.name][: 4 if place.kind == "hidden" else 1] = False
    said = ParameterCounter(found, whole).remaining(keep)
    for kind in DENSE_KINDS:
        here = unit_groups(model, kind)
        if kind in ("heads", "neurons"):  # renamed groups, while ``keep`` has their old names
            kept = {place.name: [*range(1, place.units)] for place in here}
            apply_removal(model, here, kept, None)
        else:
            kept = {place.name: keep[place.name].nonzero().flatten().tolist() for place in here}
            apply_removal(model, here, kept, stock_entries(model, here, kept))
    assert model.num_parameters() == said < whole


def test_the_formula_of_heads_neurons_and_hidden_dimensions_of_a_gated_decoder():
    """The count matches the closed-form formula.

    n_layers (2 d' d_h (h' + kv') + 3 d' f' + norms) + embeddings + head.
    """
    model = tiny("llama")
    found = [place for kind in ("hidden", "heads", "neurons") for place in unit_groups(model, kind)]
    keep = all_kept(found)
    keep[found[0].name][:8] = False
    for place in found[1:]:
        keep[place.name][: 1 if place.kind == "heads" else 24] = False
    d, per_layer = 24, 24 * (2 * 16 + 2 * 8) + 3 * 24 * 40 + 2 * 24
    assert (
        ParameterCounter(found, model.num_parameters()).remaining(keep)
        == 2 * per_layer + d + 2 * 96 * d
    )


def test_what_goes_with_a_unit_is_what_is_counted_less_without_it():
    """Costs are those at the remaining shape, not at the original one."""
    model = tiny("llama")
    found = [place for kind in DENSE_KINDS for place in unit_groups(model, kind)]
    count = ParameterCounter(found, model.num_parameters())
    keep = all_kept(found)
    costs = count.costs(keep)
    assert all(torch.equal(costs[place.name], place.costs) for place in found)
    for place in found:
        keep[place.name][: place.units // 2] = False
    costs, whole = count.costs(keep), count.remaining(keep)
    for place in found:
        without = {name: units.clone() for name, units in keep.items()}
        without[place.name][-1] = False
        assert whole - count.remaining(without) == costs[place.name][-1], place.kind


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8, 1.0])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_keeps_the_largest_part_of_the_densest_units_that_meets_the_budget(share, scope):
    """The reference searches all prefixes; one more group would exceed the budget."""
    model = tiny("llama", num_key_value_heads=4)
    whole = model.num_parameters()
    found = [place for kind in ("hidden", "heads", "neurons") for place in unit_groups(model, kind)]
    scores, keep = random_scores(found), all_kept(found)
    asked = BudgetConstraints(int(share * whole), scope=scope)
    stays = select_within_budget(found, scores, keep, whole, asked)
    count = ParameterCounter(found, whole)
    order = UnitOrder(found, scores, keep, count.costs(keep), asked)
    assert count.remaining(stays) <= share * whole
    fitting = [
        n for n in range(len(order) + 1) if count.remaining(order.keep_first(n)) <= share * whole
    ]
    expected = order.keep_first(max(fitting))
    assert all(torch.equal(stays[name], expected[name]) for name in stays)
    for place in found:  # the kept units have the highest scores of their group
        score, units = scores[place.name], stays[place.name]
        assert units.any()
        assert units.all() or score[units].min() >= score[~units].max()
    if scope == "layer":
        for kind in ("heads", "neurons"):
            numbers = {int(stays[place.name].sum()) for place in found if place.kind == kind}
            assert len(numbers) == 1


def test_a_unit_goes_first_if_its_score_is_low_for_its_parameters():
    """Units are ranked by score per parameter."""
    model = tiny("llama", num_key_value_heads=4)
    found = [place for kind in ("heads", "neurons") for place in unit_groups(model, kind)]
    heads, neurons = found[0], found[-1]
    factor = float(heads.costs[0] / neurons.costs[0])
    whole = model.num_parameters()
    asked = BudgetConstraints(whole - int(heads.costs[0]))
    for times, first in ((0.9, "heads"), (1.1, "neurons")):
        scores = {place.name: torch.ones(place.units, dtype=torch.float64) for place in found}
        for place in found:
            if place.kind == "heads":
                scores[place.name] *= times * factor
        stays = select_within_budget(found, scores, all_kept(found), whole, asked)
        gone = {place.kind for place in found if not stays[place.name].all()}
        assert gone == {first}


def test_what_is_in_a_block_that_went_takes_nothing_and_stands_in_no_ones_way():
    """This state occurs from the second pruning step on."""
    model = tiny("llama", num_hidden_layers=3)
    found = [place for kind in ("blocks", "heads", "neurons") for place in unit_groups(model, kind)]
    keep, whole = all_kept(found), model.num_parameters()
    keep["model.layers"][1] = False
    count = ParameterCounter(found, whole)
    assert not count.costs(keep)["model.layers.1.mlp.down_proj"].any()
    budget = int(0.9 * count.remaining(keep))
    stays = select_within_budget(
        found, random_scores(found), keep, whole, BudgetConstraints(budget)
    )
    assert count.remaining(stays) <= budget
    assert not stays["model.layers"][1]


def test_widths_are_rounded_up_within_the_budget():
    model = tiny("llama", num_key_value_heads=4)
    found = [place for kind in ("heads", "neurons") for place in unit_groups(model, kind)]
    multiples = {place.name: place.unit_multiple(16) for place in found}
    assert multiples[found[0].name] == 2  # heads of 8 features
    assert multiples[found[-1].name] == 16
    whole = model.num_parameters()
    asked = BudgetConstraints(int(0.7 * whole), multiples=multiples)
    stays = select_within_budget(found, random_scores(found), all_kept(found), whole, asked)
    assert ParameterCounter(found, whole).remaining(stays) <= 0.7 * whole
    for place in found:
        assert int(stays[place.name].sum()) % multiples[place.name] == 0


def test_only_shapes_that_a_config_can_say_are_taken():
    """Llama's hidden size must be a multiple of its number of heads."""
    model = tiny("llama", num_key_value_heads=4)
    found = [place for kind in ("hidden", "heads") for place in unit_groups(model, kind)]
    say = expressible_in_config(model, found)
    names = [place.name for place in found]
    assert say(dict(zip(names, (32, 2, 2), strict=True)))
    assert not say(dict(zip(names, (32, 3, 3), strict=True)))
    assert say(dict(zip(names, (24, 3, 3), strict=True)))
    assert not say(dict(zip(names, (24, 3, 2), strict=True)))
    whole = model.num_parameters()
    multiples = {place.name: place.unit_multiple(1) for place in found}
    asked = BudgetConstraints(int(0.8 * whole), scope="layer", multiples=multiples, allowed=say)
    stays = select_within_budget(found, random_scores(found), all_kept(found), whole, asked)
    assert say({name: int(units.sum()) for name, units in stays.items()})


def test_a_budget_that_cannot_be_met_is_refused_with_what_can():
    model = tiny("llama")
    found = [*unit_groups(model, "neurons")]
    whole = model.num_parameters()
    least = (
        ParameterCounter(found, whole).remaining({p.name: torch.arange(64) < 5 for p in found})
        / whole
    )
    with pytest.raises(ConfigError, match=f"keeps {100 * least:.1f} % of the model stay"):
        select_within_budget(
            found,
            random_scores(found),
            all_kept(found),
            whole,
            BudgetConstraints(whole // 10, least=5),
        )
    broken = {place.name: torch.full((place.units,), float("nan")) for place in found}
    with pytest.raises(ConfigError, match="unit 0 is not a number"):
        select_within_budget(found, broken, all_kept(found), whole, BudgetConstraints(whole))


def test_numbers_that_stay_are_rounded_up_where_a_part_goes():
    """Rounding up restores the units that would have been pruned last."""
    gates = prunekit.neurons(tiny("llama"))
    scores = {site.name: torch.arange(64).double() for site in gates.linear_groups}
    removed = gates.prune(scores, 0.4, scope="layer", round_to=16)
    assert {len(units) for units in gates.kept.values()} == {48}
    assert {unit.unit for unit in removed} == set(range(16))
    assert gates.prune(scores, 0.5, scope="layer", round_to=16)
    assert {len(units) for units in gates.kept.values()} == {32}
    with pytest.raises(ConfigError, match=r"of 128 neurons 0\.4 prunes none"):
        prunekit.neurons(tiny("llama")).prune(scores, 0.4, round_to=64)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_whole_layers_go_if_none_has_to_keep_a_unit_but_one_unit_of_each_kind_is_kept(scope):
    model = tiny("llama")
    whole = model.num_parameters()
    found = [place for kind in ("heads", "neurons") for place in unit_groups(model, kind)]
    scores = {place.name: torch.full((place.units,), 1.0 + (place is found[-1])) for place in found}
    scores[found[0].name] *= 1e-6
    constraints = BudgetConstraints(0, scope, least=0)
    counter = ParameterCounter(found, whole)
    order = UnitOrder(found, scores, all_kept(found), counter.costs(all_kept(found)), constraints)
    fewest = {name: int(mask.sum()) for name, mask in order.keep_first(order.fixed).items()}
    assert [*fewest.values()] == ([0, 1, 0, 1] if scope == "global" else [1, 1, 1, 1])
    least = counter.remaining(order.keep_first(order.fixed))
    with pytest.raises(ConfigError, match="cannot be had"):
        select_within_budget(
            found, scores, all_kept(found), whole, BudgetConstraints(least - 1, scope, least=0)
        )
    kept = select_within_budget(
        found, scores, all_kept(found), whole, BudgetConstraints(least, scope, least=0)
    )
    assert {name: int(mask.sum()) for name, mask in kept.items()} == fewest
