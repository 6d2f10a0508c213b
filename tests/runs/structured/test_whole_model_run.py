"""Runs that need the whole model say so in their plan."""

import pytest

from prunekit.config.load import load_config
from prunekit.runs import jobs
from tests.support.structured import planned, write_config

HEADS = 'method = "magnitude"\npattern = "heads"\nsparsity = 0.5\n'


@pytest.mark.parametrize("pattern", ['"hidden"', '["heads", "hidden"]'])
@pytest.mark.parametrize("gradual", [False, True])
def test_only_units_that_go_while_the_model_is_trained_need_the_whole_model(
    llama, tmp_path, pattern, gradual
):
    assert planned(llama, tmp_path / "out", HEADS.replace('"heads"', pattern)).by_block
    path = write_config(llama, tmp_path / "out", HEADS + "end = 2\n" * gradual)
    path.write_text(path.read_text() + "[train]\nheld_out = 2\n")
    plan = jobs.plan(load_config(path))
    assert plan.by_block is not gradual
    assert plan.memory["model"] == 4 * plan.parameters
