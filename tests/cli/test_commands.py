"""Words on the command line: what is said where, and the exit codes."""

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import prunekit
from prunekit.cli.main import main
from prunekit.errors import CapacityError, CheckpointError, ConfigError, NumericsError, ShapeError
from tests.conftest import ROOT

CONFIG = """\
[model]
path = "a/b"
[prune]
method = "magnitude"
pattern = "2:4"
[output]
path = "out"
"""
COMMANDS = (
    *("run", "plan", "evaluate", "inspect", "verify"),
    *("report", "list", "schema", "init", "demo"),
)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.toml").write_text(CONFIG)
    return "config.toml"


@pytest.fixture
def replace(monkeypatch):
    """Stand in for modules that a command imports when it runs, all of them without torch."""

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
    """Let ``prunekit run`` carry out ``records`` and return the options that it was given."""

    def run(records=lambda: iter(()), plan=lambda config, ranks: config):
        seen = {}

        def start(plan, *, stop, **options):
            assert not stop()
            seen.update(options, plan=plan)
            return records()

        def show(records, *, quiet):
            seen["quiet"] = quiet
            return list(records)

        replace({"runs.jobs": {"plan": plan, "run": start}, "cli.progress": {"show": show}})
        return seen

    return run


def fail(error):
    """Return a function that raises ``error``, and a generator of records that does."""

    def call(*_):
        raise error

    return call


def python(*arguments):
    """Run Python in a process of its own that finds this prunekit, wherever it stands."""
    environment = os.environ | {"PYTHONPATH": str(Path(prunekit.__file__).parents[1])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


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
        f"{path}: no such file. To write one with every key explained: prunekit init {path}\n"
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


def test_evaluate_wants_to_be_told_what_to_measure(capsys):
    assert main(["evaluate", "model"]) == 2
    assert "give --data FILE, --generate TOKENS, or both" in capsys.readouterr().err


def test_run_hands_on_its_options(config, run):
    seen = run()
    sets = ["--set", "prune.skip=['a']", "--set=output.path=elsewhere"]
    assert main(["run", config, "--resume", "--overwrite", "--quiet", *sets]) == 0
    assert (seen["resume"], seen["overwrite"], seen["quiet"]) == (True, True, True)
    assert seen["plan"].prune.skip == ["a"]
    assert seen["plan"].output.path == str(Path.cwd() / "elsewhere")


def test_run_is_careful_unless_told(config, run):
    seen = run()
    assert main(["run", config]) == 0
    assert (seen["resume"], seen["overwrite"], seen["quiet"]) == (False, False, False)


@pytest.mark.parametrize("kind", [ConfigError, CheckpointError, ShapeError, CapacityError])
def test_what_the_plan_refuses_exits_with_2(config, run, kind, capsys):
    run(plan=fail(kind("model: not so.")))
    assert main(["run", config]) == 2
    assert capsys.readouterr().err == "model: not so.\n"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ConfigError, 2),
        (CheckpointError, 1),
        (ShapeError, 1),
        (CapacityError, 1),
        (NumericsError, 1),
    ],
)
def test_what_goes_wrong_on_the_way_exits_with_1(config, run, kind, code, capsys):
    run(records=fail(kind("layer: NaN.")))
    assert main(["run", config]) == code
    assert capsys.readouterr().err == "layer: NaN.\n"


def test_an_unexpected_error_keeps_its_traceback(config, run):
    run(records=fail(ZeroDivisionError("odd")))
    with pytest.raises(ZeroDivisionError, match="odd"):
        main(["run", config])


def test_a_stopped_run_says_the_command_that_goes_on(config, run, capsys):
    run(records=fail(KeyboardInterrupt()))
    Path("my out").mkdir()
    Path("my out/journal.jsonl").touch()
    assert main(["run", config, "--overwrite", "--set", "output.path=my out"]) == 130
    assert capsys.readouterr().err == (
        "Stopped; the finished blocks are kept. To go on: "
        "prunekit run config.toml --resume --set 'output.path=my out'\n"
    )


def test_a_run_stopped_before_it_wrote_says_so(config, run, capsys):
    run(records=fail(KeyboardInterrupt()))
    assert main(["run", config]) == 130
    assert capsys.readouterr().err == "Stopped; nothing was written.\n"


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


def test_plan_prints_the_plan(config, replace, capsys):
    made = SimpleNamespace(describe=lambda: "[bold]a plan")

    def plan(config, ranks, preflight):
        assert (ranks.size, preflight) == (8, (80 * 10**9, 10**12))
        return made

    jobs = {"plan": plan, "Preflight": lambda *memory: memory, "estimate": lambda _: "a day"}
    replace({"runs.jobs": jobs})
    memory = ["--device-memory", "80GB", "--host-memory", "1TB"]
    assert main(["plan", config, "--world-size", "8", *memory]) == 0
    assert capsys.readouterr().out == "a plan\ntime: a day\n"


@pytest.mark.parametrize(
    "option", [["--device-memory", "much"], ["--world-size", "0"], ["--host-memory", "1GB"]]
)
def test_plan_refuses_what_no_machine_is(config, option, capsys):
    assert main(["plan", config, *option]) == 2
    assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "number", "least"),
    [("--length", "1", 2), ("--windows", "0", 1), ("--windows", "-3", 1), ("--generate", "-1", 0)],
)
def test_evaluate_refuses_numbers_that_cannot_be_meant(capsys, option, number, least):
    assert main(["evaluate", "m", "--data", "pydoc:test", option, number]) == 2
    assert capsys.readouterr().err == f"{option} {number}: is at least {least}.\n"


def test_evaluate_prints_what_was_measured(replace, capsys):
    def evaluate(*arguments, ranks):
        assert arguments == ("m", ("pydoc:test", "pydoc:train"), 64, 3)
        return [{"data": "a.txt", "metric": "perplexity", "value": 20.7, "protocol": "3 windows"}]

    replace({"evaluation.perplexity": {"evaluate": evaluate}})
    sources = ["--data", "pydoc:test", "--data", "pydoc:train"]
    assert main(["evaluate", "m", *sources, "--length", "64", "--windows", "3"]) == 0
    assert capsys.readouterr().out == "a.txt: perplexity 20.70\n  3 windows\n"


def test_evaluate_names_all_texts_that_are_not_there(capsys):
    assert main(["evaluate", "m", "--data", "no.txt", "--data", "pydoc:x"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "--data no.txt: no such file.",
        "--data pydoc:x: choose pydoc:train or pydoc:test.",
    ]


def test_inspect_prints_every_tensor_in_full(replace, capsys):
    name = "model.layers.0." + "x" * 80
    facts = {"shape": [4, 8], "dtype": "float32", "sparsity": 0.5, "n_of_m": "2:4"}
    found = [{"name": name, **facts, "format": "bitmask"}]
    replace({"evaluation.inspect": {"inspect": lambda path: found}})
    assert main(["inspect", "m"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == (
        [name, "4x8", "float32", "50.0", "%", "2:4", "bitmask"]
    )


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_verify_exits_with_1_when_a_check_fails(replace, passed, code, capsys):
    checks = [
        SimpleNamespace(name="files", passed=True, detail="sound"),
        SimpleNamespace(name="zeros", passed=passed, detail="7 zeros"),
    ]
    replace({"evaluation.verify": {"verify": lambda path: checks}})
    assert main(["verify", "m"]) == code
    word = "passed" if passed else "FAILED"
    assert capsys.readouterr().out == f"passed  files: sound\n{word}  zeros: 7 zeros\n"


def test_report_writes_the_page_again(tmp_path, capsys):
    example = (ROOT / "tests/support/example_report.json").read_text()
    (tmp_path / "report.json").write_text(example)
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"


def test_report_of_no_run_exits_with_2(tmp_path):
    assert main(["report", str(tmp_path)]) == 2


def test_list_names_everything_with_settings_and_defaults(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for word in ("sparsegpt", "damping = 0.01", "owl", "n:m", "cubic", "llama", "uniform"):
        assert word in shown


def test_schema_prints_json(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Config"


def test_init_writes_a_config_and_never_overwrites_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    text = Path("config.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text)["prune"]["method"] == "admm"
    Path("config.toml").write_text("mine")
    assert main(["init"]) == 2
    assert Path("config.toml").read_text() == "mine"
    assert main(["init", "no/such/folder.toml"]) == 2
    assert "is already there" in capsys.readouterr().err


def test_demo_shows_its_runs_side_by_side(replace, capsys):
    module = {"demo": lambda folder: [folder], "table": lambda reports: f"{reports}"}
    replace({"cli.demo": module})
    assert main(["demo", "here"]) == 0
    assert "here" in capsys.readouterr().out


def test_the_namespace_gives_what_it_promises():
    from prunekit.runs import jobs

    # Importing a submodule sets it as an attribute, which must not hide a promised name.
    assert prunekit.plan is jobs.plan
    assert prunekit.run is jobs.run
    modules = {path.stem for path in Path(prunekit.__file__).parent.iterdir()}
    assert not modules & set(prunekit.__all__)
    assert set(prunekit.__all__) <= set(dir(prunekit))
    for name in prunekit.__all__:
        assert callable(getattr(prunekit, name)), name


def test_the_namespace_refuses_other_names():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        prunekit.nothing  # noqa: B018
