"""Budgets of windows: parameters counted from shapes, and units that fit."""

import pytest
import torch

import prunekit
from prunekit.config.apt_table import Apt
from prunekit.errors import ConfigError
from prunekit.structured.parameter_budget import counted_parameters
from prunekit.training.apt.budget import WindowBudget
from tests.support.architectures import tiny


def budget_of(**values):
    model = tiny("llama", num_key_value_heads=4)
    asked = Apt.model_validate({"parameters": 0.5, "windows": 2, **values})
    groups = [*prunekit.heads(model).groups, *prunekit.neurons(model).groups]
    keep = {group.name: torch.ones(group.units, dtype=torch.bool) for group in groups}
    return WindowBudget(model, asked), groups, keep, model


def test_each_window_keeps_as_many_parameters_as_its_cubic_budget_allows():
    """gamma_1 = 0.5 + 0.5 (1 - 1/2)^3, and one unit more would not fit."""
    budget, groups, keep, model = budget_of()
    whole = sum(each.numel() for each in counted_parameters(model, "blocks"))
    assert budget.first == budget.remaining(groups, keep) == whole
    scores = {group.name: torch.arange(group.units, 0.0, -1) for group in groups}
    largest = max(group.parameters_per_unit for group in groups)
    for window, share in ((1, 0.5625), (2, 0.5)):
        kept = budget.select(groups, scores, keep, window)
        left = budget.remaining(groups, kept)
        assert share * whole - largest < left <= share * whole


def test_a_uniform_budget_keeps_as_many_in_every_layer():
    budget, groups, keep, _ = budget_of(uniform=True)
    generator = torch.Generator().manual_seed(3)
    scores = {group.name: torch.rand(group.units, generator=generator) for group in groups}
    kept = budget.select(groups, scores, keep, 2)
    for kind in ("heads", "neurons"):
        counts = {int(kept[group.name].sum()) for group in groups if group.kind == kind}
        assert len(counts) == 1


def test_a_budget_that_no_removal_meets_is_refused():
    budget, groups, keep, _ = budget_of(parameters=0.999, round_to=64)
    with pytest.raises(ConfigError, match=r"parameters: 99\.9 % cannot be had"):
        budget.check(groups, keep)
