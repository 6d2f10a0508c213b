"""The printed plan of a sparsify run, and its hidden-state placement."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from prunekit.distributed.ranks import Ranks
from prunekit.runs.preflight import requested_placement
from tests.support import checkpoints
from tests.support.checkpoints import planned


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"))


def shown(plan):
    console = Console(width=200, record=True, file=StringIO())
    console.print(plan.describe())
    return console.export_text()


def test_sizes_are_those_of_linears_that_are_pruned(folder, tmp_path):
    plan = planned(folder, tmp_path / "out", prune={"skip": ["*.q_proj"]})
    pruned = [linear for linear in plan.linears if not linear.name.endswith("q_proj")]
    assert plan.sizes == {linear.name: linear.outputs * linear.inputs for linear in pruned}
    assert plan.prunable == sum(plan.sizes.values())


def test_linears_that_differ_in_their_block_only_share_a_row(folder, tmp_path):
    text = shown(planned(folder, tmp_path / "out", prune={"skip": ["*.q_proj"]}))
    assert "12 of 14 linears are pruned" in text
    assert "model.layers.*.self_attn.q_proj  ×2  (dense)" in text
    assert "model.layers.*.mlp.down_proj  ×2" in text


def test_ranks_and_traffic_are_shown_for_several_ranks_only(folder, tmp_path):
    plan = planned(folder, tmp_path / "out")
    assert "each process sends" not in shown(plan)
    shared = replace(plan, ranks=Ranks(0, 2), traffic={"statistics": 1000})
    assert "each process sends 1 kB of statistics" in shown(shared)


@pytest.mark.parametrize(
    ("hidden", "where"), [("auto", None), ("device", "device"), ("host", "host"), ("disk", "disk")]
)
def test_the_config_can_place_hidden_states(folder, tmp_path, hidden, where):
    plan = planned(folder, tmp_path / "out", calibration={"hidden": hidden})
    assert requested_placement(plan.config) == where
    assert ("as calibration.hidden asks" in shown(plan)) == (where is not None)
