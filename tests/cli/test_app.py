"""Help and version of the application, options of every command, completion."""

import os

import pytest

import prunekit
from prunekit.cli.app import GLOBAL_OPTIONS, is_verbose
from prunekit.cli.main import main

COMMANDS = (
    *("run", "plan", "advise", "evaluate", "inspect", "verify"),
    *("report", "list", "schema", "init", "demo"),
    *("status", "compare", "push", "completion"),
)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    assert "Usage: prunekit" in capsys.readouterr().out


def test_help_names_every_command(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    assert all(f" {command} " in shown for command in COMMANDS)


def test_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == prunekit.__version__


@pytest.fixture
def no_options(monkeypatch):
    """Restore the variables that options of every command set."""
    for variable in GLOBAL_OPTIONS.values():
        monkeypatch.setenv(variable, "")


def test_options_of_every_command_may_stand_anywhere(no_options, monkeypatch, capsys):
    assert main(["--no-color", "list", "wanda", "--verbose"]) == 0
    assert os.environ["NO_COLOR"] == "1"
    assert is_verbose()
    assert "wanda" in capsys.readouterr().out
    assert main(["list", "wander", "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_errors_are_one_line_otherwise(no_options, capsys):
    assert not is_verbose()
    assert main(["list", "wander"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_complete_every_command(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)
