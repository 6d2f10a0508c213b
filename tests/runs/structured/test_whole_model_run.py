"""Runs that need the whole model say so in their plan."""

import pytest

from prunekit.config.load import load_config
from prunekit.runs import jobs
from tests.support.structured import planned, write_config

HEADS = 'method = "magnitude"\npattern = "heads"\nsparsity = 0.5'


@pytest.mark.parametrize("pattern", ['"hidden"', '["heads", "hidden"]'])
def test_a_training_needs_the_whole_model(llama, tmp_path, pattern):
    assert planned(llama, tmp_path / "out", HEADS.replace('"heads"', pattern)).by_block
    path = write_config(llama, tmp_path / "out", HEADS)
    path.write_text(path.read_text() + "[train]\nheld_out = 2\n")
    plan = jobs.plan(load_config(path))
    assert not plan.by_block
    assert plan.memory["model"] == 4 * plan.parameters
