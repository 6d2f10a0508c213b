"""Lines of keys, overrides, and files that cannot be read."""

import os

import pytest

from prunekit.config.load import load_config
from prunekit.config.toml_source import SIZE_LIMIT
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xff", "is not text in UTF-8"),
        (GOOD.encode("utf-16"), "is not text in UTF-8"),
        (bytes(range(128)) * 9, "config.toml:1: .* "),
        (b"#" * SIZE_LIMIT + b"\n", "is larger than a config may be, 1 MiB"),
        (b"", "model: missing"),
    ],
)
def test_says_that_a_file_is_no_config(tmp_path, content, message):
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "config.toml")


def test_a_pipe_or_device_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null"):
        with pytest.raises(ConfigError, match="is not a file but a folder, pipe or device"):
            load_config(path)


def test_what_is_no_path_is_refused():
    for path in (3, None, b"config.toml"):
        with pytest.raises(ConfigError, match="is not a path of a TOML file"):
            load_config(path)
    with pytest.raises(ConfigError, match="is no name of a file"):
        load_config("\0")
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        load_config("x" * 300)


@pytest.mark.parametrize("number", ["9" * 30, "-" + "9" * 5000, "0x" + "f" * 6000])
def test_integers_beyond_64_bits_are_refused_with_their_line(mistakes, number):
    message = "an integer is outside the range of TOML, 64 bits with sign."
    assert mistakes(f"a = 1\nb = [\n1, {{ c = {number} }}]\n") == [f"config.toml:2: {message}"]
    (said,) = mistakes(GOOD, f"calibration.seed={number}")
    assert said.startswith("--set calibration.seed=")
    assert said.endswith(message)
    assert len(said) < 250


def test_a_deeply_nested_text_is_refused_with_its_line(mistakes):
    message = "tables, arrays and dotted keys nest more than 16 deep."
    for deep in ("a" + ".a" * 20_000 + " = 1", "a = " + "[" * 20_000, "[" + "a." * 20_000 + "a]"):
        assert mistakes(f"x = 1\n{deep}\n") == [f"config.toml:2: {message}"]


TABLES = "model, calibration, apt, prune, train, distill, evaluate, gates, output"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune." + "a." * 3000 + "a=1", "a key has at most 16 parts."),
        ("prune.sparsity=" + "[" * 9000, "tables, arrays and dotted keys nest more than 16 deep."),
        ("a" * 9000 + "=1", f"no such key. Choose: {TABLES}."),
        ("prune.sparsity=1\n[x]", r'"1\n[x]" is not a number.'),
        ("a\nb=1", rf"a\nb: no such key. Choose: {TABLES}."),
        (".=1", "write KEY=VALUE, e.g. prune.sparsity=0.6."),
        ("=1", "write KEY=VALUE, e.g. prune.sparsity=0.6."),
        ('prune."sparsity"=1', 'no such key. Did you mean "sparsity"?'),
        ("output.path=", '"" is not a path.'),
    ],
    ids=lambda each: each[:20],
)
def test_odd_overrides_are_one_short_line(mistakes, override, message):
    (said,) = mistakes(GOOD, override)
    assert said.startswith("--set ")
    assert said.endswith(message)
    assert len(said) < 340


def test_overrides_may_be_one_text_and_are_texts(tmp_path):
    (tmp_path / "config.toml").write_text(GOOD)
    assert load_config(tmp_path / "config.toml", "prune.sparsity=0.7").prune.sparsity == 0.7
    for overrides in (3, None, [3], [b"a=1"]):
        with pytest.raises(ConfigError, match="are not texts KEY=VALUE"):
            load_config(tmp_path / "config.toml", overrides)


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
