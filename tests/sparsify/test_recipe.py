"""Recipes: statistics, dependence of blocks, sparsity over steps."""

import pytest

from prunekit.config.prune_table import Prune
from prunekit.errors import ConfigError
from prunekit.models.layout import Block, Linear
from prunekit.sparsify.recipe import Recipe
from prunekit.statistics import ColumnEnergy, CrossGram, Gram, SampledGram

HALF = {"pattern": "unstructured", "sparsity": 0.5}
SECTIONS = [
    {"method": "magnitude", **HALF},
    {"method": "random", "pattern": "2:4"},
    {"method": "wanda", **HALF},
    {"method": "admm", "pattern": "2:4"},
    {"method": "magnitude", "refine": "pcg", **HALF},
    {"method": "magnitude", "target": "dense", **HALF},
    {"method": "magnitude", "recover": "lowrank", **HALF},
    {"method": "magnitude", "pattern": "2:4", "permute": True},
]


def recipe(*, calibrated=True, **section):
    return Recipe.of(Prune.model_validate(section), calibrated=calibrated)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: "-".join(map(str, section)))
def test_needs_statistics_exactly_where_the_table_needs_calibration_text(section):
    found = Prune.model_validate(section)
    needs = bool(Recipe.of(found, calibrated=False).needs)
    assert needs == (found.calibration_user is not None)


def test_the_setting_that_needs_text_is_named():
    def user(**section):
        return Prune.model_validate({**HALF, **section}).calibration_user

    assert user(method="wanda") == "method wanda"
    assert user(method="magnitude", allocation="owl") == "allocation owl"
    assert user(method="wanda", recover="block") == "recover block"
    assert user(method="magnitude") is None


def test_statistics_are_a_minimal_union():
    assert set(recipe(method="sparsegpt", **HALF).needs) == {Gram}
    assert set(recipe(method="wanda", **HALF).needs) == {ColumnEnergy, SampledGram}
    assert recipe(method="wanda", measure_error=False, **HALF).needs == (ColumnEnergy,)
    assert {Gram, CrossGram} <= set(recipe(method="wanda", target="dense", **HALF).needs)


def test_blocks_depend_on_each_other_where_statistics_see_pruned_ones():
    assert not recipe(method="wanda", **HALF).blocks_independent
    assert recipe(method="wanda", propagation="none", **HALF).blocks_independent
    assert recipe(calibrated=False, method="magnitude", **HALF).blocks_independent
    assert recipe(method="wanda", **HALF).outputs_read == "by-next-block"
    assert recipe(calibrated=False, method="magnitude", **HALF).outputs_read == "none"


def test_steps_rise_to_the_final_sparsity():
    steps = {"steps": 4, "initial_sparsity": 0.2}
    found = recipe(method="sparsegpt", pattern="unstructured", sparsity=0.8, **steps)
    reached = [found.sparsity(step, 0.8) for step in range(1, 5)]
    assert reached == sorted(reached)
    assert reached[-1] == 0.8
    assert recipe(method="wanda", **HALF).sparsity(1, 0.3) == 0.3


def test_experts_and_independent_blocks_cannot_be_recovered():
    expert = Linear("m.0.e.up", "e.up", 8, 4, expert="e")
    blocks = [Block("m.0", ((expert,),))]
    recipe(method="wanda", **HALF).check(blocks)
    with pytest.raises(ConfigError, match=r'recover = "block": m.0.e.up'):
        recipe(method="wanda", recover="block", **HALF).check(blocks)
    with pytest.raises(ConfigError, match='propagation = "none"'):
        recipe(method="wanda", recover="block", propagation="none", **HALF).check([])
