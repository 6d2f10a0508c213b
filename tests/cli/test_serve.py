"""Command that says how a checkpoint is served."""

import json
import os
import sys
from dataclasses import dataclass

import pytest

from prunekit.cli.main import main


@dataclass
class Plan:
    command: tuple = ("vllm", "serve", "a b")
    format: str = "2:4"
    needs_prunekit: bool = True
    notes: tuple = ("Install it.",)


@pytest.fixture
def given(replace):
    seen = {}

    def plan_serving(folder, options):
        seen.update(folder=str(folder), options=[*options])
        return Plan()

    replace({"inference.serving": {"plan_serving": plan_serving}})
    return seen


def test_prints_the_command_and_its_notes(given, capsys):
    assert main(["serve", "a b", "--max-model-len", "512"]) == 0
    assert capsys.readouterr().out == "vllm serve 'a b'\n  Install it.\n"
    assert given == {"folder": "a b", "options": ["--max-model-len", "512"]}


def test_prints_json(given, capsys):
    assert main(["serve", "m", "--json"]) == 0
    expected = {"command": ["vllm", "serve", "a b"], "format": "2:4", "needs_prunekit": True}
    assert json.loads(capsys.readouterr().out) == expected | {"notes": ["Install it."]}


def test_runs_the_program_beside_the_interpreter(given, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda *call: started.append(call))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    program = tmp_path / "vllm"
    program.touch()
    assert main(["serve", "m", "--run", "--port", "1"]) == 0
    assert started == [(str(program), [str(program), "serve", "a b"])]
    assert given["options"] == ["--port", "1"]


def test_says_where_vllm_is_missing(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(os, "execv", None)
    assert main(["serve", "m", "--run"]) == 2
    assert "--run: vLLM is not installed where prunekit is" in capsys.readouterr().err
