"""``[prune]``: clashing keys, defaults that depend on the method, patterns."""

import pytest

from prunekit.errors import ConfigError
from prunekit.methods import methods
from prunekit.methods.sparsegpt import SparseGPT
from prunekit.patterns.unstructured import Unstructured
from tests.support.configs import GOOD, prune

WANDA = 'method = "wanda"\n'


ANY = f'{WANDA}pattern = "unstructured"\nsparsity = 0.5\n'


CLASHES = [
    (
        f'{WANDA}pattern = "2:4"\nsparsity = 0.4',
        ['config.toml:4: prune.sparsity: "2:4" fixes the sparsity at 0.5; remove this key.'],
    ),
    (
        f'{WANDA}pattern = "2:4"\nsparsity = 0.7\nscope = "row"\nallocation = "owl"\nsteps = 2',
        [
            'config.toml:4: prune.sparsity: "2:4" fixes the sparsity at 0.5; remove this key.',
            'config.toml:5: prune.scope: applies to "unstructured" only, not to "2:4".',
            'config.toml:6: prune.allocation: "2:4" fixes one sparsity for all layers; remove '
            '"owl".',
            'config.toml:7: prune.steps: "2:4" fixes the sparsity, so only 1 step is possible.',
        ],
    ),
    (
        f'{WANDA}pattern = "row"\nscope = "row"',
        [
            'config.toml:1: prune.sparsity: missing. "row" needs a fraction from 0 to 1.',
            'config.toml:4: prune.scope: applies to "unstructured" only, not to "row".',
        ],
    ),
    (
        f'{ANY}allocation = "global"',
        [
            'config.toml:5: prune.allocation: "global" is defined for the scores of magnitude, '
            "not of wanda."
        ],
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
            "allocation, skip, propagation, steps, end, start, every, schedule, initial_sparsity, "
            "regrow, regrow_every, on_indivisible, refine, target, starved, starved_below, "
            "recover, recover_rank, permute, measure_error.",
            'config.toml:7: prune.allocation: "owls" is not an allocation. Did you mean "owl"? '
            "Choose: curves, global, owl, uniform.",
        ],
    ),
    (
        f'{ANY}schedule = "linear"\ninitial_sparsity = 0.1',
        [
            "config.toml:5: prune.schedule: applies only with 2 steps or more, or with end.",
            "config.toml:6: prune.initial_sparsity: applies only with 2 steps or more, or with "
            "end.",
        ],
    ),
    (
        f"{ANY}steps = 3\ninitial_sparsity = 0.6",
        ["config.toml:6: prune.initial_sparsity: 0.6 is above the final sparsity."],
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


def test_not_a_number_is_no_sparsity(mistakes):
    (line,) = mistakes(GOOD, "prune.sparsity=nan")
    assert line.startswith("--set prune.sparsity=nan: ")


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


def test_propagation_is_what_suits_the_method_unless_it_is_said(load):
    assert load(GOOD).prune.propagation == "block"
    assert load(GOOD, "prune.method=wanda").prune.propagation == "block"
    said = load(GOOD, "prune.method=wanda", "prune.propagation=stage")
    assert said.prune.propagation == "stage"


def test_without_propagation_weights_aim_at_the_layer_and_go_in_one_step(load):
    apart = ["prune.method=admm", "prune.propagation=none"]
    assert load(GOOD, *apart).prune.target == "layer"
    with pytest.raises(ConfigError, match='propagation "none" has the target "dense" anyway'):
        load(GOOD, *apart, "prune.target=dense")
    with pytest.raises(ConfigError, match='propagation "none" allows only 1 step'):
        load(GOOD, "prune.propagation=none", "prune.steps=2")


def test_method_and_pattern_have_defaults(load):
    given = load(prune("sparsity = 0.5\ndamping = 0.02")).prune
    assert (given.method, given.pattern.name) == (methods()["admm"](damping=0.02), "unstructured")
    text = 'sparsity = 0.5\n[model]\npath = "a/b"\n[output]\npath = "out"\n'
    with pytest.raises(ConfigError, match=r"calibration\.data: missing"):
        load(f"[prune]\n{text}")


def test_a_sparsity_that_agrees_with_the_pattern_is_accepted(load):
    given = load(prune('pattern = "1:3"\nsparsity = 0.6666666667')).prune
    assert given.model_dump() == load(prune('pattern = "1:3"')).prune.model_dump()
    assert given.sparsity == given.pattern.sparsity
