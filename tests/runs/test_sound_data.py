"""Calibration on sound with text: statistics are those of the whole dense model."""

import json

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from prunekit.config.run_config import Config, StructuredConfig
from prunekit.errors import ConfigError
from prunekit.evaluation.verify import verify
from prunekit.models.stock import random_features
from prunekit.runs.sparsify.run import SparsifyRun
from prunekit.runs.structured import planner as structured
from prunekit.runs.structured.run import run
from prunekit.runs.trained import planner as trained
from tests.support.checkpoints import planned, run_whole_and_stopped, tensors, write
from tests.support.family_trial import find_problems
from tests.support.speech import BINS, FRAMES, write_speech
from tests.support.tiers import often
from tests.support.vision import write_lines

HALF = {"pattern": "unstructured", "sparsity": 0.5, "propagation": "block"}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return write_speech(tmp_path_factory.mktemp("whisper") / "dense")


def batches_of(rows):
    """Return the inputs that the whole model takes."""
    return [{name: value for name, value in row.items() if name != "input_ids"} for row in rows]


@pytest.mark.usefixtures("no_page")
def test_masks_are_those_of_hooks_on_the_whole_model(tmp_path):
    folder = write_speech(tmp_path / "dense")
    sections = {"prune": HALF, "calibration": {"data": str(folder / "rows.jsonl"), "length": 64}}
    plan = planned(folder, tmp_path / "written", **sections)
    list(SparsifyRun(plan).records(resume=False, overwrite=False))
    kind, rows = WhisperForConditionalGeneration, batches_of(plan.images.rows)
    assert len(rows) == 4
    assert not [*find_problems(kind, tmp_path, plan, rows)]
    other = [{**row, "input_features": -row["input_features"]} for row in rows]
    assert [*find_problems(kind, tmp_path, plan, other)]
    assert all(check.passed for check in verify(tmp_path / "written"))
    report = json.loads((tmp_path / "written/report.json").read_text())
    assert "4 of 4 rows of dense/rows.jsonl" in report["calibration"]["description"]
    assert not any("random features" in note for note in report["notes"])


@pytest.mark.usefixtures("no_page")
def test_text_alone_is_calibrated_on_random_features_with_a_note(tmp_path):
    folder = write_speech(tmp_path / "dense")
    plan = planned(folder, tmp_path / "written", prune=HALF)
    assert any("is calibrated on random features" in note for note in plan.notes)
    job = SparsifyRun(plan)
    list(job.records(resume=False, overwrite=False))
    ids = job._texts()[0].ids
    rows = [{"input_features": random_features(ids, (BINS, FRAMES)), "decoder_input_ids": ids}]
    assert not [*find_problems(WhisperForConditionalGeneration, tmp_path, plan, rows)]


@pytest.mark.usefixtures("no_page")
def test_a_stopped_run_ends_in_the_same_bytes(whisper, tmp_path):
    sections = {
        "calibration": {"data": str(whisper / "rows.jsonl"), "length": 64},
        "prune": {"method": "admm", "pattern": "2:4", "propagation": "stage"},
    }
    whole, stopped = (
        tensors(folder) for folder in run_whole_and_stopped(whisper, tmp_path, **sections)
    )
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_lengths_are_capped_at_those_of_the_decoder(whisper, tmp_path):
    plan = planned(whisper, tmp_path / "out", calibration={"length": 500})
    assert plan.lengths[0] == 64


def test_random_features_depend_on_the_tokens_of_their_sample_alone():
    ids = torch.tensor([[1, 2], [3, 4]])
    both = random_features(ids, (2, 3))
    assert torch.equal(both[1:], random_features(ids[1:], (2, 3)))
    assert not torch.equal(both[0], both[1])


def test_a_model_of_text_is_refused(tmp_path, whisper):
    folder = write(tmp_path / "dense")
    with pytest.raises(ConfigError, match="of which LlamaForCausalLM reads no log-mel features"):
        planned(folder, tmp_path / "out", calibration={"data": str(whisper / "rows.jsonl")})


def test_other_data_beside_sound_are_refused(whisper, tmp_path):
    data = [str(whisper / name) for name in ("rows.jsonl", "text.txt")]
    with pytest.raises(ConfigError, match="other entries text alone"):
        planned(whisper, tmp_path / "out", calibration={"data": data})


def test_a_missing_sound_is_refused_in_the_plan(whisper, tmp_path):
    rows = write_lines(tmp_path / "rows.jsonl", [{"audio": "nowhere.wav", "text": "a"}])
    with pytest.raises(ConfigError, match="no such file"):
        planned(whisper, tmp_path / "out", calibration={"data": str(rows)})


@pytest.mark.parametrize(
    ("kind", "planner", "sections"),
    [
        (
            StructuredConfig,
            structured,
            {"prune": {"method": "magnitude", "pattern": "neurons", "sparsity": 0.5}},
        ),
        (
            Config,
            trained,
            {"train": {"steps": 1, "held_out": 1}, "prune": {"method": "wanda", "pattern": "2:4"}},
        ),
    ],
)
def test_units_and_training_are_refused(whisper, tmp_path, kind, planner, sections):
    config = kind.model_validate(
        {
            "model": {"path": str(whisper), "device": "cpu"},
            "calibration": {"data": str(whisper / "text.txt"), "samples": 2, "length": 8},
            "output": {"path": str(tmp_path / "out")},
            **sections,
        }
    )
    with pytest.raises(ConfigError, match="encodes sound; of such models weights are pruned"):
        planner.plan(config)


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("pattern", often(["neurons", "blocks"], ["neurons"]))
def test_units_go_by_rankers_that_read_no_text(whisper, tmp_path, pattern):
    config = StructuredConfig.model_validate(
        {
            "model": {"path": str(whisper), "device": "cpu"},
            "prune": {"method": "random", "pattern": pattern, "sparsity": 0.5},
            "output": {"path": str(tmp_path / "out")},
        }
    )
    list(run(structured.plan(config)))
    assert all(check.passed for check in verify(tmp_path / "out"))
