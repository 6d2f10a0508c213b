"""Ranks join by the variables that torchrun sets."""

import pytest

from prunekit.distributed.join import VARIABLES, join
from prunekit.distributed.ranks import SINGLE
from prunekit.errors import ConfigError

SOUND = dict(zip(VARIABLES, ("1", "2", "127.0.0.1", "29500"), strict=True))


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    for name, value in SOUND.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("size", [None, "1"])
def test_one_process_joins_nothing(variables, size):
    variables.setenv("WORLD_SIZE", size) if size else variables.delenv("WORLD_SIZE")
    assert join("cpu") is SINGLE


@pytest.mark.parametrize("name", sorted({*VARIABLES} - {"WORLD_SIZE"}))
def test_a_missing_variable_is_named(variables, name):
    variables.delenv(name)
    with pytest.raises(ConfigError, match=f"WORLD_SIZE is 2, but {name} is not set"):
        join("cpu")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", "2", "RANK is 2; of WORLD_SIZE=2 ranks it must be 0 to 1"),
        ("RANK", "-1", "RANK is -1"),
        ("RANK", "first", "must be numbers: .*'first'"),
        ("WORLD_SIZE", "two", "must be numbers: .*'two'"),
        ("WORLD_SIZE", "0", "of WORLD_SIZE=0 ranks"),
        ("MASTER_PORT", "http", "must be numbers: .*'http'"),
    ],
)
def test_a_variable_that_is_wrong(variables, name, value, said):
    variables.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        join("cpu")
