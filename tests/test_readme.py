"""Examples and commands in README, CONTRIBUTING and the pages of docs work as printed."""

import re
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

import prunekit
from prunekit.allocations import allocations
from prunekit.architectures import Architecture, declared_model_types
from prunekit.cli import app, main  # noqa: F401  registers the commands
from prunekit.cli.docs import pages
from prunekit.methods import Scored, methods
from prunekit.structured.rankers import rankers
from tests.conftest import ROOT
from tests.support import checkpoints
from tests.support.adapters import PEFT_WARNS
from tests.support.architectures import tiny
from tests.support.labelled import SENTENCES, write_rows

README = (ROOT / "README.md").read_text("utf-8")
CONTRIBUTING = (ROOT / ".github/CONTRIBUTING.md").read_text("utf-8")
PAGES = {name: page.read_text("utf-8") for name, page in pages().items()}
ALL = "\n".join([README, *PAGES.values()])


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def first_cells(heading: str) -> set[str]:
    """Return the first column of the table with this heading."""
    table = ALL[ALL.index(f"| {heading} |") :].split("\n\n")[0]
    return {re.sub(r"[`\"]", "", row.split("|")[1]).split()[0] for row in table.splitlines()[2:]}


def test_config_is_accepted_as_it_stands(tmp_path):
    (tmp_path / "demo/SmolLM2-135M-Instruct").mkdir(parents=True)
    (tmp_path / "config.toml").write_text(blocks(README, "toml")[0])
    config = prunekit.load_config(tmp_path / "config.toml", ["prune.pattern=4:8"])
    assert config.prune.pattern.name == "4:8"
    units, sweep = (
        next(c for c in blocks(ALL, "toml") if k in c) for k in ('pattern = ["heads', "[sweep]")
    )
    (tmp_path / "units.toml").write_text(units)
    assert prunekit.load_config(tmp_path / "units.toml").prune.pattern == ["heads", "neurons"]
    (tmp_path / "sweep.toml").write_text(sweep)
    assert len(prunekit.load_config(tmp_path / "sweep.toml").runs) == 9


def test_pruning_while_training_in_a_loop_and_in_the_trainer(tmp_path):
    row = torch.arange(3, 12)
    loop, trainer = (code for code in blocks(PAGES["training"], "python") if "every=10" in code)
    space = {
        "torch": torch,
        "transformers": transformers,
        "prunekit": prunekit,
        "model": tiny("llama"),
        "batches": [{"input_ids": row[None], "labels": row[None]}] * 51,
    }
    exec(loop, space)
    assert space["pruner"].done
    space["pruner"].remove()
    space["arguments"] = transformers.TrainingArguments(
        str(tmp_path), max_steps=51, save_strategy="no", report_to=[], use_cpu=True
    )
    space["model"], space["samples"] = tiny("llama"), [{"input_ids": row, "labels": row}] * 8
    exec(trainer, space)
    assert space["callback"].pruner.done


@pytest.mark.slow
def test_pruning_while_training_as_a_run(tmp_path, proof_in_process):
    checkpoints.write(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(checkpoints.TEXT)
    config = next(t for t in blocks(PAGES["training"], "toml") if "[train]" in t and "end =" in t)
    (tmp_path / "config.toml").write_text(config)
    *_, finish = prunekit.run(prunekit.plan(prunekit.load_config(tmp_path / "config.toml")))
    assert finish.values["sparsity"]["achieved"] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.filterwarnings(*PEFT_WARNS)
@pytest.mark.parametrize("task", ["classification", None])
def test_adapters_prune_as_printed(tmp_path, proof_in_process, monkeypatch, task):
    """The two configs, with fewer steps than their defaults."""
    pytest.importorskip("peft")
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")
    text = next(
        t for t in blocks(PAGES["adapters"], "toml") if "[apt]" in t and ("task" in t) == bool(task)
    )
    (tmp_path / "config.toml").write_text(text)
    if task:
        checkpoints.write(tmp_path / "classifier", "bert", head=AutoModelForSequenceClassification)
        for name in ("train.tsv", "dev.tsv"):
            write_rows(tmp_path / name, ("text", "label"), *SENTENCES)
    else:
        checkpoints.write(tmp_path / "model", "llama")
        (tmp_path / "text.txt").write_text(checkpoints.TEXT)
    quick = {"warmup": 2, "window": 2, "windows": 2, "steps": 6, "held_out": 2, "round_to": 1}
    changes = [f"apt.{key}={value}" for key, value in quick.items()]
    changes += ["calibration.samples=8", *([] if task else ["calibration.length=12"])]
    config = prunekit.load_config(tmp_path / "config.toml", changes)
    *_, finish = prunekit.run(prunekit.plan(config))
    assert finish.values["sparsity"]["achieved"] > 0.1


def test_tables_name_what_there_is():
    assert first_cells("command") == {name for name in app.app if not name.startswith("-")}
    assert first_cells("method") == set(methods())
    assert first_cells("allocation") == set(allocations())
    assert first_cells("ranker") == set(rankers())
    said = re.search(r"^Model types: (.*?)\.", ALL, re.MULTILINE | re.DOTALL)[1]
    assert re.split(r",\s+", said) == declared_model_types()


@pytest.mark.parametrize("code", blocks(ALL + CONTRIBUTING, "python"))
def test_python_is_well_formed(code):
    compile(code, "README.md", "exec")


def test_example_method_is_a_method():
    code = next(code for code in blocks(PAGES["plugins"], "python") if "class Energy" in code)
    space = {}
    exec(code, space)
    method = space["Energy"](power=1.0)
    assert isinstance(method, Scored)

    energy = SimpleNamespace(total=torch.tensor([4.0, 16.0]))
    stats = {space["ColumnEnergy"]: energy}
    layer = SimpleNamespace(weight=torch.tensor([[-3.0, 2.0]]), stats=stats)
    assert method.score(layer).tolist() == [[18.0, 16.0]]
    entry = tomllib.loads(blocks(PAGES["plugins"], "toml")[-1])["project"]["entry-points"]
    assert list(entry) == ["prunekit.methods"]


def test_example_architecture_is_one():
    code = next(code for code in blocks(CONTRIBUTING, "python") if "Architecture(" in code)
    space = {}
    exec(code, space)
    assert any(isinstance(value, Architecture) for value in space.values())


@pytest.mark.parametrize("script", ["bench/demo.py", "tests/run.py"])
def test_commands_are_there(script):
    assert f"python3 {script}" in README
    done = subprocess.run(
        [sys.executable, ROOT / script, "--here", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage" in done.stdout.lower()


def test_continuous_integration_calls_the_command_of_the_readme():
    assert "exec python3 tests/run.py\n" in (ROOT / ".ci/run").read_text()
