"""Plans of sweeps."""

import pytest

from prunekit.config.load import load_config
from prunekit.errors import ConfigError
from prunekit.runs import jobs
from tests.support.sweeps import write_sweep


def test_a_plan_says_which_runs_cannot_be(llama, tmp_path):
    sweep = 'pattern = ["heads", "neurons"]\nsparsity = [0.5, 0.99]'
    path = write_sweep(llama, tmp_path / "out", sweep, 'method = "obs"\n')
    path.write_text(path.read_text().replace('pattern = "neurons"\n', ""))
    with pytest.raises(ConfigError, match=r"^heads-0\.99: sparsity: \d+ units should go"):
        jobs.plan(load_config(path))
    assert not (tmp_path / "out").exists()
