"""Checks across tables: format, calibration, output folder; dumps."""

import json
from pathlib import Path

import pytest

from prunekit.config.run_config import Config
from prunekit.errors import ConfigError
from tests.support.configs import GOOD, prune


@pytest.mark.parametrize("pattern", ["unstructured", "4:8"])
def test_the_format_has_to_fit_the_pattern(load, mistakes, pattern):
    sparsity = "sparsity = 0.5\n" if pattern == "unstructured" else ""
    text = prune(f'method = "wanda"\npattern = "{pattern}"\n{sparsity}')
    assert load(f'{text}format = "bitmask"\n').output.format == "bitmask"
    (mistake,) = mistakes(f'{text}format = "2:4"\n')
    assert mistake.endswith(
        f'output: format "2:4" stores patterns 2:4 and 1:4, not "{pattern}". Choose bitmask, which '
        "stores any, or dense."
    )


@pytest.mark.parametrize(
    ("lines", "needed"),
    [
        ('method = "wanda"\npattern = "2:4"', True),
        ('method = "magnitude"\npattern = "2:4"', False),
        ('method = "magnitude"\npattern = "row"\nsparsity = 0.5\nallocation = "owl"', True),
        ('method = "magnitude"\npattern = "row"\nsparsity = 0.5\nallocation.name = "owl"', True),
    ],
)
def test_calibration_is_demanded_where_something_needs_it(load, lines, needed):
    if not needed:
        assert load(prune(lines, rest="")).calibration is None
        return
    with pytest.raises(ConfigError, match=r"^config\.toml: calibration\.data: missing\. Calib"):
        load(prune(lines, rest=""))


def test_calibration_is_demanded_also_beside_other_mistakes(mistakes):
    said = mistakes(prune('method = "wanda"\npattern = "2:4"\nskip = 1', rest=""))
    assert [line.partition(" is ")[0].partition(" Calib")[0] for line in said] == [
        "config.toml: calibration.data: missing.",
        "config.toml:4: prune.skip: 1",
    ]


@pytest.mark.parametrize("output", ["m", "."])
def test_the_model_is_never_the_output(mistakes, tmp_path, output):
    (tmp_path / "m").mkdir()
    (line,) = mistakes(GOOD, "model.path=m", f"output.path={output}")
    assert "contains the model; name another." in line


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "prune.scope=layer",
            'prune.allocation={name="owl", spread=0.1}',
            "evaluate.data=pydoc:test",
        ),
        ("prune.steps=4", "prune.schedule=linear", "prune.initial_sparsity=0.1"),
        ("prune.method=random", "prune.random_seed=3", "prune.pattern=row"),
    ],
)
def test_a_dump_is_json_and_says_the_same_when_read_again(load, overrides):
    dump = load(GOOD, *overrides).dump()
    again = Config.model_validate(json.loads(json.dumps(dump)), strict=True)
    assert again.dump() == dump
    assert None not in dump["prune"].values()


def test_a_dump_has_the_keys_that_the_user_would_write(load):
    assert load(GOOD, "prune.damping=0.5").dump() == {
        "model": {
            "path": "Qwen/Qwen3-0.6B",
            "part": "language",
            "dtype": "auto",
            "device": "auto",
        },
        "calibration": {
            "data": ["pydoc:train"],
            "samples": 128,
            "length": 2048,
            "seed": 0,
            "hidden": "auto",
        },
        "prune": {
            "method": "sparsegpt",
            "damping": 0.5,
            "keep_zeros": False,
            "order": "given",
            "pattern": "unstructured",
            "scope": "block",
            "sparsity": 0.5,
            "allocation": "uniform",
            "skip": [],
            "propagation": "block",
            "steps": 1,
            "on_indivisible": "error",
            "target": "layer",
            "permute": False,
            "measure_error": True,
        },
        "output": {
            "path": str(Path.cwd() / "out"),
            "format": "dense",
            "max_shard_size": 50 * 10**9,
        },
    }
