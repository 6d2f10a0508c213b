"""[prune] of a structured run: accepted tables, defaults and refusals."""

import os
import subprocess
import sys

import pytest

from prunekit.config.load import load_config
from prunekit.config.run_config import StructuredConfig
from prunekit.config.schema import schema
from prunekit.config.structured_table import StructuredPrune
from prunekit.errors import ConfigError
from prunekit.structured.rankers import rankers
from tests.conftest import ROOT
from tests.support import checkpoints
from tests.support.structured import BOTH, write_config


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return checkpoints.write(folder, num_hidden_layers=3, num_key_value_heads=4)


def test_a_pattern_of_units_makes_another_kind_of_config(llama, tmp_path):
    found = load_config(write_config(llama, tmp_path / "out", BOTH))
    assert isinstance(found, StructuredConfig)
    assert found.prune.pattern == ["heads", "neurons"]
    assert (found.prune.scope, found.prune.compensate) == ("global", "refit")
    again = StructuredConfig.model_validate(found.dump())
    assert again.dump() == found.dump()
    other = BOTH.replace('["neurons", "heads"]', '"heads"').replace("obs", "output-norm")
    found = load_config(write_config(llama, tmp_path / "out", f"{other}\nuniform = true"))
    assert (found.prune.scope, found.prune.compensate) == ("layer", "none")


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ('method = "obs"\npattern = "heads"\nsparsity = 1.0', ":11: prune.sparsity: 1.0 is not"),
        ('method = "obs"\npattern = "heads"', "prune.sparsity: missing. Fraction of the units"),
        (
            'method = "obs"\npattern = "heads"\nsparsity = 0.5\nparameters = 0.5',
            "prune.sparsity: parameters is set too; remove one of both.",
        ),
        (
            'method = "obs"\npattern = "heads"\nparameters = 0.5\nsteps = "each"',
            'prune.steps: "each" needs sparsity',
        ),
        (
            'method = "obs"\npattern = "heads"\nsparsity = 0.5\nsteps = "all"',
            'prune.steps: "all" is neither a whole number from 1 to 1,000,000 nor "each".',
        ),
        (
            'method = "head-magnitude"\npattern = "heads"\nsparsity = 0.5',
            "is not a method. Did you",
        ),
        ('method = "entropy"\npattern = "neurons"\nsparsity = 0.5', "entropy ranks heads, not neu"),
        (
            'method = "hybrid"\npattern = "neurons"\nsparsity = 0.5\nof = { entropy = 1.0 }',
            "prune.pattern: entropy ranks heads, not neurons.",
        ),
        (
            'method = "hybrid"\npattern = "heads"\nsparsity = 0.5\nof = { taste = 1.0 }',
            "prune.of: 'taste' is no ranker. Choose: block-influence, entropy, flap",
        ),
        (
            'method = "obs"\npattern = "heads"\nsparsity = 0.5\nnormalised = true',
            "prune.normalised: a setting of entropy, gradient, not of obs.",
        ),
        (
            'method = "obs"\npattern = ["heads", "heads"]\nsparsity = 0.5',
            '"heads" is listed twice.',
        ),
        (
            'method = "reap"\npattern = "experts"\nsparsity = 0.5\nscope = "global"',
            '"global" leaves layers with unequal experts',
        ),
        (
            'method = "obs"\npattern = "heads"\nsparsity = 0.5\nuniform = true\nscope = "global"',
            '"global" makes layers of different sizes',
        ),
        (
            'method = "obs"\npattern = "heads"\nsparsity = 0.5\nschedule = "linear"',
            "applies only with 2 steps or more, or with end.",
        ),
        (
            'method = "obs"\npattern = "heads"\nsparsity = 0.5\nallocation = "owl"',
            "prune.allocation: no such key.",
        ),
    ],
)
def test_mistakes_are_said_with_their_line(llama, tmp_path, prune, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write_config(llama, tmp_path / "out", prune))
    assert message in str(caught.value)


def test_a_ranker_that_runs_the_model_wants_a_text_and_zeros_have_no_part_in_it(llama, tmp_path):
    path = write_config(llama, tmp_path / "out", BOTH)
    text = path.read_text()
    begin, end = text.index("[calibration]"), text.index("[prune]")
    path.write_text(text[:begin] + text[end:])
    with pytest.raises(ConfigError, match=r"calibration\.data: missing"):
        load_config(path)
    load_config(path, ["prune.method=magnitude"])
    with pytest.raises(ConfigError, match=r"calibration\.data: missing"):
        load_config(path, ["prune.method=magnitude", "prune.compensate=refit"])
    with pytest.raises(ConfigError, match='format "bitmask" stores zeros'):
        load_config(path, ["prune.method=magnitude", "output.format=bitmask"])


def test_the_schema_tells_units_from_weights():
    jsonschema = pytest.importorskip("jsonschema")
    made = schema()
    base = {"model": {"path": "m"}, "output": {"path": "o"}, "calibration": {"data": "pydoc:train"}}
    for prune, right in (
        ({"method": "obs", "pattern": "heads", "sparsity": 0.5, "damping": 0.1}, True),
        ({"method": "magnitude", "pattern": ["heads", "neurons"], "sparsity": 0.5}, True),
        ({"method": "magnitude", "pattern": "2:4"}, True),
        ({"method": "magnitude", "pattern": "heads", "sparsity": 0.5, "refine": "pcg"}, False),
        ({"method": "wanda", "pattern": "heads", "sparsity": 0.5}, False),
        ({"method": "obs", "pattern": "2:4"}, False),
    ):
        try:
            jsonschema.validate({**base, "prune": prune}, made)
        except jsonschema.ValidationError:
            assert not right, prune
        else:
            assert right, prune


def test_no_ranker_has_a_setting_called_like_a_key_of_prune():
    for kind in rankers().values():
        assert not kind.model_fields.keys() & StructuredPrune.model_fields.keys()
        assert all(field.description for field in kind.model_fields.values())
    assert all(field.description for field in StructuredPrune.model_fields.values())


def test_a_mistake_about_units_is_said_without_torch(llama, tmp_path):
    path = write_config(
        llama, tmp_path / "out", 'method = "obs"\npattern = "heads"\nsparsity = 2.0'
    )
    code = (
        "import sys; from prunekit.cli.main import main; "
        f"assert main(['run', {str(path)!r}]) == 2; sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 0
