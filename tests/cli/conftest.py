"""A config, and stubs for the modules that commands import."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.configs import load  # noqa: F401

CONFIG = """\
[model]
path = "a/b"
[prune]
method = "magnitude"
pattern = "2:4"
[output]
path = "out"
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.toml").write_text(CONFIG)
    return "config.toml"


@pytest.fixture
def replace(monkeypatch):
    """Replace modules that a command imports when it runs by stubs without torch."""

    def replace(modules):
        for name, names in modules.items():
            package, _, leaf = f"prunekit.{name}".rpartition(".")
            module = ModuleType(f"prunekit.{name}")
            vars(module).update(names)
            monkeypatch.setitem(sys.modules, module.__name__, module)
            monkeypatch.setattr(importlib.import_module(package), leaf, module, raising=False)

    return replace


@pytest.fixture
def run(replace):
    """Let ``prunekit run`` consume ``records``; return the options that it was given."""

    def run(records=lambda: iter(()), plan=lambda config, ranks: config):
        seen = {}

        def start(plan, *, stop, **options):
            assert not stop()
            seen.update(options, plan=plan)
            return records()

        def display(records, *, quiet):
            seen["quiet"] = quiet
            return list(records)

        replace({"runs.jobs": {"plan": plan, "run": start}, "cli.progress": {"display": display}})
        return seen

    return run
