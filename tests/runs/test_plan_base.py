"""Values that all plans share."""

import pytest

from tests.support import checkpoints, structured
from tests.support.architectures import tiny
from tests.support.checkpoints import planned


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def test_parameters_are_counted_once_when_tied(tmp_path, output):
    folder = checkpoints.write(tmp_path / "m", tie_word_embeddings=True)
    model = tiny("llama", tie_word_embeddings=True)
    assert planned(folder, output).parameters == model.num_parameters()
    untied = checkpoints.write(tmp_path / "n", tie_word_embeddings=False)
    assert planned(untied, output).parameters == model.num_parameters() + 96 * 32


@pytest.mark.parametrize(("model_type", "blocks"), [("llama", 2), ("t5", 4)])
def test_blocks_of_all_stacks_are_counted(tmp_path, output, model_type, blocks):
    overrides = {"num_layers": 2, "num_decoder_layers": 2} if model_type == "t5" else {}
    plan = planned(checkpoints.write(tmp_path / "m", model_type, **overrides), output)
    assert plan.block_count == len(plan.blocks) == blocks


def test_plans_of_both_kinds_count_the_same_parameters(tmp_path, output):
    folder = checkpoints.write(tmp_path / "m")
    zeros = planned(folder, output)
    units = structured.planned(folder, output, structured.BOTH)
    assert zeros.parameters == units.parameters
    assert 0 < zeros.prunable <= zeros.parameters
    assert 0 < units.prunable <= units.parameters
