"""Lines of keys, overrides, and files that cannot be read."""

import pytest

from prunekit.config.load import load_config
from prunekit.errors import ConfigError
from prunekit.methods.sparsegpt import SparseGPT
from tests.support.configs import GOOD, prune


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
    with pytest.raises(ConfigError, match=r"no such file\. To create one .*: prunekit init "):
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


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    file = tmp_path / "config.toml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_config(file).prune.method == SparseGPT()


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
