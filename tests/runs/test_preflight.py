"""Plans for another machine: its memory, its device, its files."""

import shutil

import pytest
import torch

from prunekit.distributed.ranks import Ranks
from prunekit.runs.preflight import (
    Preflight,
    available_memory,
    planned_checkpoint,
    planned_device,
)
from tests.support import checkpoints
from tests.support.checkpoints import planned


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"))


def test_memory_of_another_machine_is_as_it_was_stated():
    cuda = torch.device("cuda")
    assert available_memory(cuda, Preflight(80, 500)) == (80, 500)
    assert available_memory(cuda, Preflight(80))[1] > 10**15
    here = available_memory(torch.device("cpu"), Preflight())
    assert min(here) > 0


def test_another_machine_has_a_gpu_whatever_is_here(folder, tmp_path):
    config = planned(folder, tmp_path / "out").config
    assert planned_device(config, Ranks(), Preflight(80)).type == "cuda"
    assert planned_device(config, Ranks(), Preflight()).type == "cpu"


def test_the_config_alone_is_enough_only_for_a_plan_that_is_shown(folder, tmp_path):
    config = planned(folder, tmp_path / "out").config
    _, alone = planned_checkpoint(config, Preflight(80))
    assert not alone
    outline = tmp_path / "outline"
    outline.mkdir()
    shutil.copy(folder / "config.json", outline)
    model = config.model.model_copy(update={"path": str(outline)})
    shown, alone = planned_checkpoint(config.model_copy(update={"model": model}), Preflight(80))
    assert alone
    whole, _ = planned_checkpoint(config, None)
    assert shown.entries.keys() == whole.entries.keys()
