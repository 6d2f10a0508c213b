"""Parameters that the model computes and no checkpoint has."""

import torch

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.models.computed import computed_buffers, fill_computed
from prunekit.models.empty_model import empty_model
from prunekit.models.load import load
from tests.support import checkpoints
from tests.support.architectures import tiny

NAMES = {f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")}


def test_a_model_without_weights_has_the_computed_ones(tmp_path):
    checkpoint = open_checkpoint(checkpoints.write(tmp_path, "marian"))
    assert not NAMES & checkpoint.entries.keys()
    expected = dict(tiny("marian").named_parameters())
    for model in (empty_model(checkpoint), load(tmp_path)):
        found = computed_buffers(model)
        assert found.keys() == NAMES
        for name, value in found.items():
            assert torch.equal(value, expected[name])


def test_a_model_that_stores_all_is_left_as_it_is():
    model = tiny("llama")
    before = [*model.state_dict()]
    fill_computed(model)
    assert [*model.state_dict()] == before
    assert computed_buffers(model) == {}
