"""Exit codes and messages for errors; nothing heavy is imported for them."""

from pathlib import Path

import pytest

from prunekit.cli.main import main
from tests.support.processes import python


def fail(error):
    """Return a function that raises ``error``, and a generator of records that does."""

    def call(*_):
        raise error

    return call


def test_help_and_config_errors_come_without_torch(config):
    code = (
        "import sys; from prunekit.cli.main import main; main(['--help']); "
        "assert main(['run', 'config.toml', '--set', 'prune.steps=0']) == 2; "
        "assert main(['schema']) == 0; sys.exit(any(name in sys.modules for name in "
        "('torch', 'transformers', 'matplotlib')))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_wrong_config_exits_with_2_and_plain_lines_on_stderr(config):
    done = python("-m", "prunekit", "run", config, "--set", "prune.steps=0", "--set", "modl.x=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "--set prune.steps=0: 0 is not possible: at least 1.",
        '--set modl.x=1: modl: no such key. Did you mean "model"?',
    ]
    assert [file.name for file in Path().iterdir()] == [config]


def test_a_missing_config_exits_with_2(tmp_path, capsys):
    path = tmp_path / "config.toml"
    assert main(["plan", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"{path}: no such file. To create one with every key explained: prunekit init {path}\n"
    )


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["rum"], "Did you mean run?"),
        (["run", "config.toml", "--resum"], "Did you mean --resume?"),
        (["run"], "CONFIG requires an argument"),
    ],
)
def test_a_wrong_usage_exits_with_2_and_a_hint(arguments, hint, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "prunekit --help" in said.err
    assert hint in said.err.replace('"', "")


def test_an_unexpected_error_keeps_its_traceback(config, run):
    run(records=fail(ZeroDivisionError("odd")))
    with pytest.raises(ZeroDivisionError, match="odd"):
        main(["run", config])


def test_ctrl_c_ends_a_process_without_traceback(config):
    code = (
        "import os, signal, sys, types, prunekit; "
        # A process in the background of a shell is born deaf to Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "stop = lambda *_: os.kill(os.getpid(), signal.SIGINT); "
        "jobs = types.SimpleNamespace(plan=stop, Preflight=lambda *_: None); "
        "import prunekit.runs; sys.modules['prunekit.runs.jobs'] = prunekit.runs.jobs = jobs; "
        "from prunekit.cli.main import main; sys.exit(main(['plan', 'config.toml']))"
    )
    done = python("-c", code)
    assert done.returncode == 130
    assert done.stderr == "Stopped.\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(5, "Input/output error", "/data/m"), "/data/m: Input/output error. Mend that"),
        (OSError(24, "Too many open files"), "Too many open files. Mend that"),
    ],
)
def test_what_the_system_refuses_exits_with_1(config, run, error, said, capsys):
    run(records=fail(error))
    assert main(["run", config]) == 1
    assert capsys.readouterr().err.startswith(said)


def test_an_error_that_is_not_of_the_system_keeps_its_traceback(config, run):
    run(records=fail(OSError("odd")))
    with pytest.raises(OSError, match="odd"):
        main(["run", config])
