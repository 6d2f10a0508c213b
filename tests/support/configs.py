"""TOML texts of small configs, and fixtures that load them."""

from pathlib import Path

import pytest

from prunekit.config.load import load_config
from prunekit.errors import ConfigError

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


def prune(lines: str, rest: str = '[calibration]\ndata = "pydoc:train"\n') -> str:
    """Return a config whose ``[prune]`` begins on line 1."""
    return f'[prune]\n{lines}\n{rest}[model]\npath = "a/b"\n[output]\npath = "out"\n'


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
    """Return the lines of the error of a config, its folder as ``FOLDER``."""

    def mistakes(text, *overrides):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return str(caught.value).replace(str(Path.cwd()), "FOLDER").splitlines()

    return mistakes
