"""``prunekit run`` and ``prunekit plan``: options, exit codes, interruptions."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from prunekit.cli.main import main
from prunekit.errors import CapacityError, CheckpointError, ConfigError, NumericsError, ShapeError


def fail(error):
    """Return a function that raises ``error``, and a generator of records that does."""

    def call(*_):
        raise error

    return call


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


def test_a_stopped_run_says_the_command_that_goes_on(config, run, capsys):
    run(records=fail(KeyboardInterrupt()))
    Path("my out").mkdir()
    Path("my out/journal.jsonl").touch()
    assert main(["run", config, "--overwrite", "--set", "output.path=my out"]) == 130
    assert capsys.readouterr().err == (
        "Stopped; finished blocks are kept. To resume: "
        "prunekit run config.toml --resume --set 'output.path=my out'\n"
    )


def test_a_run_stopped_before_it_wrote_says_so(config, run, capsys):
    run(records=fail(KeyboardInterrupt()))
    assert main(["run", config]) == 130
    assert capsys.readouterr().err == "Stopped; nothing was written.\n"


def test_plan_prints_the_plan(config, replace, capsys):
    made = SimpleNamespace(describe=lambda: "a plan [/b]")

    def plan(config, ranks, preflight):
        assert (ranks.size, preflight) == (8, (80 * 10**9, 10**12))
        return made

    jobs = {"plan": plan, "Preflight": lambda *memory: memory, "estimate": lambda _: "a day"}
    replace({"runs.jobs": jobs})
    memory = ["--device-memory", "80GB", "--host-memory", "1TB"]
    assert main(["plan", config, "--world-size", "8", *memory]) == 0
    assert capsys.readouterr().out == "a plan [/b]\ntime: a day\n"


@pytest.mark.parametrize(
    "option", [["--device-memory", "much"], ["--world-size", "0"], ["--host-memory", "1GB"]]
)
def test_plan_refuses_what_no_machine_is(config, option, capsys):
    assert main(["plan", config, *option]) == 2
    assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--world-size", str(2**63), "must be at most 100,000."),
        ("--device-memory", "9" * 400 + "GB", "write a number with a unit"),
    ],
)
def test_plan_refuses_numbers_of_no_machine(config, option, value, said, capsys):
    assert main(["plan", config, option, value]) == 2
    assert said in capsys.readouterr().err
