"""[sweep]: variants of a run, their names, and refusals."""

import re

import pytest

from prunekit.cli.main import main
from prunekit.config.load import load_config
from prunekit.config.run_config import StructuredConfig
from prunekit.config.schema import schema
from prunekit.errors import ConfigError
from prunekit.runs import jobs
from tests.support import checkpoints
from tests.support.sweeps import BASE, TWO_BY_TWO, write_sweep


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama"))


def test_each_value_meets_each_other_and_every_run_has_a_folder(llama, tmp_path):
    config = load_config(write_sweep(llama, tmp_path / "out", TWO_BY_TWO))
    assert list(config.runs) == [
        "obs-0.25", "obs-0.5", "flap+standardised+False-0.25", "flap+standardised+False-0.5",
    ]  # fmt: skip
    alone = config.standalone("flap+standardised+False-0.5")
    assert isinstance(alone, StructuredConfig)
    assert alone.output.path == str(tmp_path / "out/runs/flap+standardised+False-0.5")
    assert alone.prune.model_dump()["standardised"] is False
    plan = jobs.plan(config)
    assert [plan.series(name) for name in plan.runs] == ["obs"] * 2 + [
        "flap, standardised False"
    ] * 2


def test_weights_are_swept_by_the_same_table(llama, tmp_path):
    text = BASE.replace("{prune}", "{prune}\nmethod = 'wanda'").replace('"neurons"', '"2:4"')
    path = write_sweep(llama, tmp_path / "out", 'pattern = ["2:4", "heads"]', text=text)
    with pytest.raises(ConfigError, match=r"\.toml:11: prune\.method: \"wanda\" is not a method"):
        load_config(path)
    path = write_sweep(llama, tmp_path / "out", 'pattern = ["2:4", "4:8"]', text=text)
    plan = jobs.plan(load_config(path))
    assert [plan.series(name) for name in plan.runs] == ["wanda, 2:4", "wanda, 4:8"]


def test_all_mistakes_are_said_at_once_and_once(llama, tmp_path):
    sweep = 'method = ["obs", "tast", "entropy"]\nsparsity = [0.5, 2.0]\nleast = 3\ntokens = -1'
    path = write_sweep(llama, tmp_path / "out", sweep, text=BASE.replace("[evaluate]", "[elevate]"))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).count("least: 3 is not a list of values") == 1
    assert ":11: sweep: needs [evaluate]" in str(caught.value)
    assert ":15: sweep.tokens: -1 is not possible: at least 0." in str(caught.value)
    path = write_sweep(llama, tmp_path / "out", sweep.replace("least = 3\ntokens = -1", ""))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    text = str(caught.value)
    assert text.count("\n") == 2
    assert ':12: prune.method: "tast" is not a method.' in text
    assert ":13: prune.sparsity: 2.0 is not possible" in text
    assert ":9: prune.pattern: entropy ranks heads, not neurons." in text


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("", "names no key of [prune]"),
        ("method = []", "method: [] is not a list of values"),
        ('method = ["obs", "obs"]', "obs is listed twice"),
        ("a = [1, 2, 3]\nb = [" + "1, " * 400 + "]", "make 1,200 runs"),
        ("".join(f"k{key} = [1, 2, 3]\n" for key in range(60)), "a sweep has at most 1,000"),
        ('method = [".."]', '".." would be the folder of a run'),
        ("a = [[], 1]", '"" would be the folder of a run'),
        (f'method = ["{"x" * 256}"]', "a name has 1 to 255 bytes"),
    ],
)
def test_a_table_that_makes_no_runs_is_refused(llama, tmp_path, sweep, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(write_sweep(llama, tmp_path / "out", sweep, "sparsity = 0.5"))


def test_the_preset_sentinel_has_the_numbers_of_that_benchmark(tmp_path):
    """Levels, learning rate, early stop, intervals, samples, batch and length, in one config."""
    path = tmp_path / "sentinel.toml"
    assert main(["init", str(path), "--preset", "sentinel"]) == 0
    (tmp_path / "demo/SmolLM2-135M-Instruct").mkdir(parents=True)
    made = load_config(path)
    assert len(made.runs) == 12
    assert {run.prune.sparsity for run in made.runs.values()} == {0.1, 0.3, 0.5}
    train = made.first.train
    assert (train.rate, train.patience, train.every, train.batch) == (1e-5, 5, 50, 4)
    assert (train.held_out, made.first.calibration.length, made.sweep.tokens) == (100, 128, 50)


def test_the_schema_has_the_table(llama):
    jsonschema = pytest.importorskip("jsonschema")
    base = {"model": {"path": "m"}, "output": {"path": "o"}, "calibration": {"data": "pydoc:train"}}
    base["prune"] = {"method": "obs", "pattern": "heads", "sparsity": 0.5}
    validator = jsonschema.Draft202012Validator(schema())
    assert validator.is_valid(base | {"sweep": {"method": ["obs"], "tokens": 3}})
    assert not validator.is_valid(base | {"sweep": {"method": "obs"}})


def test_seeds_and_samples_are_those_of_the_calibration_and_of_methods_that_draw(llama, tmp_path):
    sweep = 'method = ["obs", "random"]\nseed = [3, 4]\nsamples = [2, 4]\nsparsity = [0.5]'
    config = load_config(write_sweep(llama, tmp_path / "out", sweep))
    assert list(config.runs)[:2] == ["obs-seed3-samples2-0.5", "obs-seed3-samples4-0.5"]
    found = {
        name: (one.calibration.seed, one.calibration.samples, one.prune.model_dump().get("seed"))
        for name, one in config.runs.items()
    }
    assert found["obs-seed4-samples2-0.5"] == (4, 2, None)
    assert found["random-seed3-samples4-0.5"] == (3, 4, 3)
    plan = jobs.plan(config)
    assert plan.series("obs-seed3-samples2-0.5") == "obs, samples 2"
    assert len({plan.series(name) for name in plan.runs}) == 4


def test_a_seed_is_that_of_the_method_where_no_text_is_read(llama, tmp_path):
    text = BASE.replace('"neurons"', '"2:4"')
    text = text[: text.index("[calibration]")] + text[text.index("[prune]") :]
    sweep = 'method = ["random", "magnitude"]\nseed = [1, 2]'
    config = load_config(write_sweep(llama, tmp_path / "out", sweep, text=text))
    assert [one.calibration for one in config.runs.values()] == [None] * 4
    assert config.runs["random-seed2"].prune.method.random_seed == 2
    with pytest.raises(ConfigError, match=r"calibration\.data: missing"):
        load_config(write_sweep(llama, tmp_path / "out", "samples = [1, 2]", text=text.replace(
            "{prune}", 'method = "magnitude"')))  # fmt: skip
