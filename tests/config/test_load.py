"""What the user wrote: every mistake at once with its place, and what a right config becomes."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import prunekit
from prunekit.allocations import allocations
from prunekit.allocations.owl import Owl
from prunekit.config.load import SECTIONS, load_config
from prunekit.config.prune_table import Prune
from prunekit.config.run_config import Config
from prunekit.config.schema import schema
from prunekit.errors import ConfigError
from prunekit.methods import methods
from prunekit.methods.admm import Admm
from prunekit.methods.sparsegpt import SparseGPT
from prunekit.patterns.unstructured import Unstructured

GOOD = """\
[model]
path = "Qwen/Qwen3-0.6B"
[calibration]
data = "pydoc:train"
[prune]
method = "sparsegpt"
pattern = "unstructured"
sparsity = 0.5
[output]
path = "out"
"""
STARTER = files("prunekit.cli").joinpath("presets", "starter.toml").read_text("utf-8")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a config from its text, as a file ``config.toml`` in the current folder."""
    monkeypatch.chdir(tmp_path)

    def load(text, *overrides):
        Path("config.toml").write_text(text, encoding="utf-8")
        return load_config("config.toml", overrides)

    return load


@pytest.fixture
def mistakes(load):
    """Return the lines that are said about a config, its folder as ``FOLDER``."""

    def mistakes(text, *overrides):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return str(caught.value).replace(str(Path.cwd()), "FOLDER").splitlines()

    return mistakes


def prune(lines, rest='[calibration]\ndata = "pydoc:train"\n'):
    """Return a config whose ``[prune]`` begins on line 1 of it."""
    return f'[prune]\n{lines}\n{rest}[model]\npath = "a/b"\n[output]\npath = "out"\n'


def test_says_all_mistakes_at_once_in_the_order_of_the_file(mistakes):
    text = """\
[model]
path = "./nowhere"
dtyp = "auto"
dtype = "flot32"
device = "gpu"
[calibration]
data = [
  "train.txt",  # [prune]
  "pydoc:trai",
]
samples = "many"
length = 0
seed = true
[prune]
method = "sparse-gpt"
damping = 0.1
patern = "2:4"
sparsity = 2
skip = "lm_head"
[prune.allocation]
name = "owl"
spred = 3
spread = 0.9
[evalute]
x = 1
[output]
format = "sparse"
"""
    assert mistakes(text, "foo", "prune.steps=0", "model.path.x=1", "prun.y=1") == [
        "--set foo: write KEY=VALUE, e.g. prune.sparsity=0.6.",
        "--set model.path.x=1: model.path is not a table.",
        "config.toml:2: model.path: FOLDER/nowhere: no such folder, nor is it a hub id such as "
        "Qwen/Qwen3-0.6B.",
        'config.toml:3: model.dtyp: no such key. Did you mean "dtype"?',
        'config.toml:4: model.dtype: "flot32" is not possible. Did you mean "float32"? '
        "Choose: auto, float32, float16, bfloat16.",
        'config.toml:5: model.device: "gpu" is not a device. Choose: auto, cpu, cuda, cuda:0.',
        "config.toml:7: calibration.data: FOLDER/train.txt: no such file.",
        "config.toml:7: calibration.data: pydoc:trai: choose pydoc:train or pydoc:test.",
        'config.toml:11: calibration.samples: "many" is not a whole number.',
        "config.toml:12: calibration.length: 0 is not possible: at least 1.",
        "config.toml:13: calibration.seed: true is not a whole number.",
        "config.toml:14: prune.pattern: missing. Where zeros may be: unstructured, n:m (n kept of "
        "every m inputs), block:RxC, row, column.",
        'config.toml:15: prune.method: "sparse-gpt" is not a method. Did you mean "sparsegpt"? '
        f"Choose: {', '.join(methods())}.",
        'config.toml:17: prune.patern: no such key. Did you mean "pattern"?',
        "config.toml:18: prune.sparsity: 2 is not possible: at most 1.",
        'config.toml:19: prune.skip: "lm_head" is not a list.',
        'config.toml:22: prune.allocation.spred: no such key. Did you mean "spread"?',
        "config.toml:23: prune.allocation.spread: 0.9 is not possible: less than 0.5.",
        'config.toml:24: evalute: no such key. Did you mean "evaluate"?',
        "config.toml:26: output.path: missing. Folder for the checkpoint, its report and its "
        "journal.",
        'config.toml:27: output.format: "sparse" is not possible. Choose: dense, 2:4, bitmask.',
        "--set prune.steps=0: 0 is not possible: at least 1.",
        '--set prun.y=1: prun: no such key. Did you mean "prune"?',
    ]


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


WANDA = 'method = "wanda"\n'
ANY = f'{WANDA}pattern = "unstructured"\nsparsity = 0.5\n'
CLASHES = [
    (
        f'{WANDA}pattern = "2:4"\nsparsity = 0.5',
        ['config.toml:4: prune.sparsity: "2:4" fixes the sparsity at 0.5; remove this key.'],
    ),
    (
        f'{WANDA}pattern = "2:4"\nsparsity = 0.7\nscope = "row"\nallocation = "owl"\nsteps = 2',
        [
            'config.toml:4: prune.sparsity: "2:4" fixes the sparsity at 0.5; remove this key.',
            'config.toml:5: prune.scope: only "unstructured" has one, "2:4" has not.',
            'config.toml:6: prune.allocation: "2:4" gives all layers one sparsity; remove "owl".',
            'config.toml:7: prune.steps: "2:4" has one sparsity only, so there is 1 step.',
        ],
    ),
    (
        f'{WANDA}pattern = "row"\nscope = "row"',
        [
            'config.toml:1: prune.sparsity: missing. "row" needs one, a fraction from 0 to 1.',
            'config.toml:4: prune.scope: only "unstructured" has one, "row" has not.',
        ],
    ),
    (
        f'{ANY}allocation = "global"',
        ['config.toml:5: prune.allocation: "global" stands for scores of magnitude, not of wanda.'],
    ),
    (
        f"{ANY}allocation = {{ x = 1 }}",
        [
            'config.toml:5: prune.allocation: {"x": 1} is not a name, or a table with a name.',
        ],
    ),
    (
        f'{ANY}damping = 0.1\nseed = 1\nallocation = "owls"',
        [
            "config.toml:5: prune.damping: a setting of admm, alps, sparsegpt, not of wanda.",
            "config.toml:6: prune.seed: no such key. Choose: method, pattern, scope, sparsity, "
            "allocation, skip, propagation, steps, schedule, initial_sparsity, on_indivisible, "
            "refine, target, starved, starved_below, recover, recover_rank, permute, "
            "measure_error.",
            'config.toml:7: prune.allocation: "owls" is not an allocation. Did you mean "owl"? '
            "Choose: curves, global, owl, uniform.",
        ],
    ),
    (
        f'{ANY}schedule = "linear"\ninitial_sparsity = 0.1',
        [
            "config.toml:5: prune.schedule: has a meaning only with steps of 2 or more.",
            "config.toml:6: prune.initial_sparsity: has a meaning only with steps of 2 or more.",
        ],
    ),
    (
        f"{ANY}steps = 3\ninitial_sparsity = 0.6",
        ["config.toml:6: prune.initial_sparsity: 0.6 is above the sparsity to reach."],
    ),
    (
        f"{WANDA}pattern = 24\nsparsity = -1\nscope = 'rows'",
        [
            'config.toml:3: prune.pattern: 24 is not text in quotes, such as "2:4".',
            "config.toml:4: prune.sparsity: -1 is not possible: at least 0.",
            'config.toml:5: prune.scope: "rows" is not possible. Did you mean "row"? '
            "Choose: row, layer, block.",
        ],
    ),
]


@pytest.mark.parametrize(("lines", "expected"), CLASHES)
def test_says_which_keys_of_prune_clash(mistakes, lines, expected):
    assert mistakes(prune(lines)) == expected


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("unstructurd", '"unstructurd" is not a pattern.'),
        ("4:2", "n:m keeps n of every m"),
        ("block:0x4", "at least one row"),
    ],
)
def test_says_how_patterns_are_spelled(mistakes, spelled, message):
    (line,) = mistakes(prune(f'{WANDA}pattern = "{spelled}"\nsparsity = 0.5'))
    assert line.startswith("config.toml:3: prune.pattern: ")
    assert message in line


def test_a_pattern_that_is_nearly_right_is_guessed(mistakes):
    (line,) = mistakes(prune(f'{WANDA}pattern = "unstructurd"\nsparsity = 0.5'))
    assert 'Did you mean "unstructured"?' in line


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
    with pytest.raises(ConfigError, match=r"^config\.toml: calibration\.data: missing\. Text on"):
        load(prune(lines, rest=""))


def test_calibration_is_demanded_also_beside_other_mistakes(mistakes):
    said = mistakes(prune('method = "wanda"\npattern = "2:4"\nskip = 1', rest=""))
    assert [line.partition(" is ")[0].partition(" Text")[0] for line in said] == [
        "config.toml: calibration.data: missing.",
        "config.toml:4: prune.skip: 1",
    ]


def test_missing_sections_are_said_without_a_line(mistakes):
    assert [line.partition(": ")[2].partition(".")[0] for line in mistakes("")] == [
        "model: missing",
        "prune: missing",
        "output: missing",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nb = \n", "config.toml:2: Invalid value (column 5)."),
        ("a = 1\n[b]\na = 2\n[b]\n", "config.toml:4: Cannot declare ('b',) twice (column 3)."),
    ],
)
def test_says_the_line_of_a_syntax_error(mistakes, text, message):
    assert mistakes(text) == [message]


def test_says_that_there_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file\. To write one .*: prunekit init "):
        load_config(tmp_path / "config.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_says_that_a_file_is_not_text(tmp_path):
    (tmp_path / "config.toml").write_bytes(b"\xff\xff")
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        load_config(tmp_path / "config.toml")


def test_finds_lines_behind_strings_and_arrays_that_look_like_tables(mistakes):
    text = prune(
        'skip = [\n  "[output]",\n  """\n[model]\npath = 3\n""",\n]\n'
        "'method' = \"wanda\"\n\"pattern\" = '2:4'\nsteps = 0"
    )
    assert mistakes(text) == ["config.toml:11: prune.steps: 0 is not possible: at least 1."]


def test_finds_lines_of_dotted_keys_and_inline_tables(mistakes):
    text = (
        'output.path = "o"\nmodel = { path = "a", dtyp = 1 }\n'
        'prune.method = "magnitude"\nprune.pattern = "2:4"\nprune.steps = 0\n'
    )
    assert mistakes(text) == [
        'config.toml:2: model.dtyp: no such key. Did you mean "dtype"?',
        "config.toml:5: prune.steps: 0 is not possible: at least 1.",
    ]


def test_not_a_number_is_no_sparsity(mistakes):
    (line,) = mistakes(GOOD, "prune.sparsity=nan")
    assert line.startswith("--set prune.sparsity=nan: ")


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    file = tmp_path / "config.toml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_config(file).prune.method == SparseGPT()


def test_fills_in_what_was_not_written(load):
    config = load(GOOD)
    assert config.calibration is not None
    assert config.calibration.data == ["pydoc:train"]
    assert config.calibration.samples == 128
    assert config.evaluate is None
    assert config.prune.method == SparseGPT(damping=0.01)
    assert config.prune.allocation == allocations()["uniform"]()
    assert config.text == GOOD


def test_unstructured_takes_its_scope_from_the_method_unless_said(load):
    published = {name: kind.scope for name, kind in methods().items()}
    for name, scope in published.items():
        pattern = load(GOOD, f"prune.method={name}").prune.pattern
        assert isinstance(pattern, Unstructured)
        assert pattern.scope == scope
        assert load(GOOD, f"prune.method={name}", "prune.scope=row").prune.pattern.scope == "row"
    assert len(set(published.values())) > 1


def test_n_of_m_brings_its_sparsity(load):
    config = load(prune('method = "wanda"\npattern = "1:4"'))
    assert config.prune.sparsity == 0.75
    assert "sparsity" not in config.dump()["prune"]


def test_settings_of_the_method_stand_beside_it(load):
    assert load(GOOD, "prune.damping=0.5").prune.method == SparseGPT(damping=0.5)


@pytest.mark.parametrize(
    "value", ['{ name = "owl", spread = 0.1 }', '{ spread = 0.1, name = "owl" }']
)
def test_an_allocation_is_a_name_or_a_table(load, value):
    assert load(GOOD, "prune.allocation=owl").prune.allocation == Owl()
    assert load(GOOD, f"prune.allocation={value}").prune.allocation == Owl(spread=0.1)


def test_paths_are_seen_from_the_folder_of_the_config(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "models" / "m").mkdir(parents=True)
    (home / "a.txt").write_text("text")
    (home / "config.toml").write_text(
        GOOD.replace("Qwen/Qwen3-0.6B", "models/m").replace('"pydoc:train"', '["./x/../a.txt"]')
    )
    monkeypatch.chdir(tmp_path)
    config = load_config("home/config.toml", ["output.path=../out"])
    assert config.model.path == str(home / "models" / "m")
    assert config.calibration is not None
    assert config.calibration.data == [str(home / "a.txt")]
    assert config.output.path == str(tmp_path / "out")


def test_hub_ids_are_left_alone(load):
    assert load(GOOD, "model.revision=main").model.path == "Qwen/Qwen3-0.6B"


def test_a_local_folder_has_no_revision(mistakes, tmp_path):
    (tmp_path / "m").mkdir()
    assert mistakes(GOOD, "model.path=m", "model.revision=main") == [
        "--set model.revision=main: FOLDER/m is a local folder, which has no revisions."
    ]


@pytest.mark.parametrize("output", ["m", "."])
def test_the_model_is_never_the_output(mistakes, tmp_path, output):
    (tmp_path / "m").mkdir()
    (line,) = mistakes(GOOD, "model.path=m", f"output.path={output}")
    assert "holds the model itself; name another." in line


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("prune.sparsity=0.6", 0.6),
        ("prune.sparsity = 0.6", 0.6),
        ("prune.sparsity=1", 1.0),
    ],
)
def test_overrides_win_over_the_file(load, override, value):
    assert load(GOOD, override).prune.sparsity == value


def test_later_overrides_win_over_earlier_ones(load, mistakes):
    assert load(GOOD, "prune.sparsity=0.6", "prune.sparsity=0.7").prune.sparsity == 0.7
    assert mistakes(GOOD, "prune.sparsity=7", "prune.sparsity=8") == [
        "--set prune.sparsity=8: 8 is not possible: at most 1."
    ]


def test_overrides_are_toml_values_or_bare_words(load, mistakes):
    config = load(GOOD, "prune.method=wanda", 'prune.skip=["a", "b"]', "evaluate.data=pydoc:test")
    assert config.prune.method.name == "wanda"
    assert config.prune.skip == ["a", "b"]
    assert config.evaluate is not None
    assert mistakes(GOOD, "prune.sparsity=0.5.1") == [
        '--set prune.sparsity=0.5.1: "0.5.1" is not a number.'
    ]


def test_an_override_takes_the_blame_only_for_what_it_wrote(mistakes):
    text = GOOD.replace("sparsity = 0.5", "sparsity = 0.5\ndamping = 0.1")
    assert mistakes(text, "prune.method=wanda", 'prune.allocation={name="owl", spread=9}') == [
        "config.toml:9: prune.damping: a setting of admm, alps, sparsegpt, not of wanda.",
        '--set prune.allocation={name="owl", spread=9}: prune.allocation.spread: 9 is not '
        "possible: less than 0.5.",
    ]


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
        "model": {"path": "Qwen/Qwen3-0.6B", "dtype": "auto", "device": "auto"},
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
        "output": {"path": str(Path.cwd() / "out"), "format": "dense"},
    }


def test_propagation_is_what_suits_the_method_unless_it_is_said(load):
    assert load(GOOD).prune.propagation == "block"
    assert load(GOOD, "prune.method=wanda").prune.propagation == "block"
    said = load(GOOD, "prune.method=wanda", "prune.propagation=stage")
    assert said.prune.propagation == "stage"


def test_without_propagation_weights_aim_at_the_layer_and_go_in_one_step(load):
    apart = ["prune.method=admm", "prune.propagation=none"]
    assert load(GOOD, *apart).prune.target == "layer"
    with pytest.raises(ConfigError, match='"dense" is what propagation "none" aims at anyway'):
        load(GOOD, *apart, "prune.target=dense")
    with pytest.raises(ConfigError, match='propagation "none" goes with 1 step'):
        load(GOOD, "prune.propagation=none", "prune.steps=2")


def test_a_config_is_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load(GOOD).prune.steps = 2


def test_no_method_has_a_setting_called_like_a_key_of_prune():
    for kind in methods().values():
        assert not kind.model_fields.keys() & Prune.model_fields.keys()


def test_every_key_and_setting_is_explained():
    kinds = [*SECTIONS.values(), *methods().values(), *allocations().values()]
    for kind in kinds:
        for key, field in kind.model_fields.items():
            assert field.description, f"{kind.__name__}.{key}"


def test_the_starter_is_right_as_it_stands(load):
    config = load(STARTER)
    assert config.prune.method == Admm()
    assert config.evaluate is not None


@pytest.mark.parametrize(
    "key", [key for section in SECTIONS.values() for key in section.model_fields]
)
def test_the_starter_names_every_key(key):
    assert re.search(rf"^(# )?{key} = ", STARTER, re.MULTILINE)


# Lines of "# key = value" that follow each other, behind the line above them.
COMMENTED = re.compile(r"(.*)\n((?:# \w+ = .+\n)+)")


@pytest.mark.parametrize("found", [*COMMENTED.finditer(STARTER)], ids=lambda found: found[2])
def test_what_the_starter_comments_out_is_the_default_or_an_example(load, found):
    written = re.sub("^# ", "", found[2], flags=re.MULTILINE)
    dump = load(STARTER[: found.start(2)] + written + STARTER[found.end(2) :]).dump()
    assert (dump == load(STARTER).dump()) != found[1].endswith("for example:")


def test_the_schema_has_every_key_and_one_table_for_each_method():
    made = schema()
    assert "null" not in json.dumps(made)
    tables = {
        table["properties"]["method"]["const"]: table for table in made["$defs"]["Prune"]["oneOf"]
    }
    assert list(tables) == list(methods())
    for name, kind in methods().items():
        keys = Prune.model_fields.keys() | kind.model_fields.keys()
        assert tables[name]["properties"].keys() == keys
        assert tables[name]["required"] == ["method", "pattern"]
        assert all(tables[name]["properties"][key]["description"] for key in keys)


def test_the_schema_takes_what_is_right_and_nothing_else():
    jsonschema = pytest.importorskip("jsonschema")
    made = schema()
    jsonschema.validate(tomllib.loads(STARTER), made)
    for key, value in {"damping": 3, "patern": "2:4", "method": "x", "activation_power": 1}.items():
        wrong = tomllib.loads(STARTER)
        wrong["prune"][key] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, made)


def test_torch_is_not_imported_for_a_config():
    code = "import sys, prunekit; prunekit.load_config; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(prunekit.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 0
