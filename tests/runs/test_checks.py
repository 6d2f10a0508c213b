"""Checks and limits that all planners share."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from prunekit.errors import CapacityError, ConfigError
from prunekit.runs.checks import generation_memory
from tests.support import checkpoints
from tests.support.checkpoints import NOT_COPIED, planned


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.mark.parametrize("model_type", ["bert", "t5", "roberta", "distilbert"])
def test_perplexity_of_what_is_no_causal_language_model_is_refused(tmp_path, output, model_type):
    folder = checkpoints.write(tmp_path / "m", model_type)
    with pytest.raises(ConfigError, match=r"has no perplexity.*Leave out \[evaluate\]"):
        planned(folder, output, evaluate={"data": str(folder / "text.txt")})
    planned(folder, output)


def test_too_little_disk_is_refused(llama, output, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=20_000, free=10_000))
    with pytest.raises(CapacityError, match=r"^output.path: .* has 10 kB free, the checkpoint"):
        planned(llama, output)


def test_an_output_that_cannot_be_written_is_refused(llama, output, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CapacityError, match=f"^output.path: {output.parent} cannot be written to"):
        planned(llama, output / "deep" / "er")


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_an_output_that_is_a_file_or_below_one_is_refused(llama, tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"output.path: .*file is a file, so .*{path} cannot be"):
        planned(llama, tmp_path / path)


def test_lengths_are_capped_at_what_the_model_takes_and_that_is_said(llama, output):
    evaluate = {"data": str(llama / "text.txt"), "length": 65}
    plan = planned(llama, output, calibration={"length": 4096}, evaluate=evaluate)
    assert plan.lengths == (64, 64)
    assert plan.notes == (
        "calibration.length shortened from 4096 to 64 tokens, the most this model takes.",
        "evaluate.length shortened from 65 to 64 tokens, the most this model takes.",
        NOT_COPIED,
    )
    assert planned(llama, output, calibration={"length": 64}).notes == (NOT_COPIED,)


def test_a_run_that_reads_no_text_needs_no_tokenizer(tmp_path, output):
    folder = checkpoints.write(tmp_path / "m")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    by_weight = {"method": "magnitude", "pattern": "2:4"}
    assert planned(folder, output, calibration=None, prune=by_weight).tokenizer is None
    with pytest.raises(ConfigError, match="has no tokenizer that can be loaded"):
        planned(folder, output, prune=by_weight)


def test_a_model_that_generates_no_text_cannot_calibrate_itself(tmp_path, output):
    folder = checkpoints.write(tmp_path / "m", "bert")
    with pytest.raises(ConfigError, match='does not write text, as "self" asks'):
        planned(folder, output, calibration={"data": "self"})


def test_memory_of_generation_counts_weights_and_a_cache(llama, output):
    plan = planned(llama, output, calibration={"data": "self", "samples": 2})
    weights = sum(parameter.numel() for parameter in plan.model.parameters())
    cache = 2 * 2 * 10 * 2 * 32  # keys and values, samples, tokens, blocks, features
    arguments = plan.config, plan.model, plan.stacks, 10
    assert generation_memory(*arguments, torch.float32) == 4 * (weights + cache)
    assert generation_memory(*arguments, torch.bfloat16) == 2 * (weights + cache)
    assert generation_memory(planned(llama, output).config, *arguments[1:], torch.float32) == 0
