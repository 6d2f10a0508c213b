"""Help and version of the application."""

import pytest

import prunekit
from prunekit.cli.main import main

COMMANDS = (
    *("run", "plan", "evaluate", "inspect", "verify"),
    *("report", "list", "schema", "init", "demo"),
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
