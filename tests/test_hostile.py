"""A checkpoint with code goes through every command: the code never runs, whatever is answered."""

import io
import json
import shutil
import sys

import pytest
import torch

import prunekit
from prunekit.cli.main import main
from prunekit.errors import PrunekitError
from prunekit.evaluation import proof
from prunekit.runs.sweep import run as sweep
from tests.support import checkpoints, structured, sweeps
from tests.support.checkpoints import WITNESS

ZERO = 'method = "wanda"\npattern = "2:4"'
UNKNOWN = {"model_type": "unheard_of"}
"""Changes of ``config.json`` after which only the code of the checkpoint could read it."""


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A checkpoint with code, and a user who says yes to everything."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")
    folder = checkpoints.hostile(tmp_path / "m")
    yield folder
    assert not list(tmp_path.rglob(WITNESS))


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(
        proof, "_in_fresh_process", lambda checkpoint: proof._here(checkpoint.folder)
    )
    monkeypatch.setattr(sweep, "run_in_subprocess", lambda function, *given: function(*given))


def config(hostile, prune=ZERO):
    return str(structured.write_config(hostile, hostile.parent / "out", prune))


def own_text(hostile):
    file = hostile.parent / "own.toml"
    file.write_text(
        f'[model]\npath = "{hostile}"\ndevice = "cpu"\n[calibration]\ndata = "self"\nsamples = 2\n'
        f'length = 6\n[prune]\n{ZERO}\n[output]\npath = "{hostile.parent / "own"}"\n'
    )
    return str(file)


COMMANDS = {
    "plan": lambda m: ["plan", config(m)],
    "run": lambda m: ["run", config(m), "--quiet"],
    "run on its own text": lambda m: ["run", own_text(m), "--quiet"],
    "run on units": lambda m: ["run", config(m, structured.BOTH), "--quiet"],
    "evaluate": lambda m: ["evaluate", str(m), "--data", str(m / "text.txt"), "--length", "12"],
    "generate": lambda m: ["evaluate", str(m), "--generate", "2"],
    "convert": lambda m: ["convert", str(m), str(m.parent / "new"), "--format", "dense"],
    "sweep": lambda m: [
        "run",
        str(
            sweeps.write_sweep(
                m, m.parent / "sweep", 'method = ["obs"]\nsparsity = [0.5]\ntokens = 0'
            )
        ),
        "--quiet",
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_ignores_code_beside_a_known_model(hostile, in_process, command, capsys):
    assert main(COMMANDS[command](hostile)) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_a_model_that_is_code(hostile, in_process, command, capsys):
    checkpoints.configure(hostile, **UNKNOWN)
    assert main(COMMANDS[command](hostile)) == 2
    assert "Code that comes with a checkpoint is never run" in capsys.readouterr().err


@pytest.fixture
def planted(hostile, tmp_path):
    """The output of a run in which somebody put code afterwards."""
    clean = checkpoints.write(tmp_path / "clean")
    list(prunekit.run(checkpoints.planned(clean, tmp_path / "out")))
    for file in hostile.rglob("*.py"):
        (tmp_path / "out" / file.relative_to(hostile)).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, tmp_path / "out" / file.relative_to(hostile))
    shutil.copyfile(hostile / "tokenizer_config.json", tmp_path / "out/tokenizer_config.json")
    told = json.loads((hostile / "config.json").read_text())
    checkpoints.configure(tmp_path / "out", auto_map=told["auto_map"], trust_remote_code=True)
    return tmp_path / "out"


AFTERWARDS = {
    "verify": lambda out: ["verify", str(out)],
    "inspect": lambda out: ["inspect", str(out)],
    "report": lambda out: ["report", str(out)],
    "convert": lambda out: ["convert", str(out), str(out.parent / "new"), "--format", "2:4"],
}


@pytest.mark.parametrize("command", AFTERWARDS)
def test_a_command_ignores_code_that_was_planted(planted, in_process, command, capsys):
    assert main(AFTERWARDS[command](planted)) == 0, capsys.readouterr()


def test_code_that_was_planted_is_refused_where_only_it_could_read_the_config(
    planted, in_process, capsys
):
    checkpoints.configure(planted, **UNKNOWN)
    assert main(AFTERWARDS["verify"](planted)) == 2
    assert main(AFTERWARDS["convert"](planted)) == 2
    assert capsys.readouterr().err.count("Code that comes with a checkpoint is never run") == 2
    with pytest.raises(PrunekitError, match="is never run"):
        prunekit.load(planted)


def test_the_stock_process_of_verify_runs_no_code(planted, capfd, forked_proof):
    assert main(["verify", str(planted)]) == 0, capfd.readouterr()


@pytest.mark.slow
def test_the_fresh_process_of_verify_runs_no_code(planted, capfd):
    """That with prunekit; nor does it get an answer from standard input."""
    folder = planted.parent / "packed"
    assert main(["convert", str(planted), str(folder), "--format", "2:4"]) == 0
    for file in planted.glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    assert main(["verify", str(folder)]) == 0, capfd.readouterr()


def test_migrate_does_not_look_at_code(hostile, capsys):
    """The layout of compressed-tensors, whose config is read by prunekit alone."""
    held = checkpoints.tensors(hostile)
    checkpoints.save(hostile, {"model.layers.0.mlp.up_proj.compressed": torch.ones(4), **held})
    checkpoints.configure(hostile, quantization_config={"format": "sparse-bitmask"}, **UNKNOWN)
    assert main(["migrate", str(hostile), str(hostile.parent / "new")]) == 2
    assert capsys.readouterr().err


def test_load_ignores_code(hostile):
    assert type(prunekit.load(hostile)).__module__.startswith("transformers.")


@pytest.mark.slow
def test_bench_ignores_code(planted, tmp_path, monkeypatch):
    monkeypatch.setattr("prunekit.inference.layer_speed.MIN_SECONDS", 0.0)
    monkeypatch.setattr("prunekit.inference.benchmark.NEW_TOKENS", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = ["--model", str(planted), "--tokens", "1", "--device", "cpu"]
    assert main(["bench", *asked, "--output", str(tmp_path / "speed")]) == 0
