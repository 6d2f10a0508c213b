"""Calibration on images with text: statistics are those of the whole dense model."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from prunekit.config.run_config import Config, StructuredConfig
from prunekit.distributed.ranks import Ranks
from prunekit.errors import ConfigError
from prunekit.runs.image_data import image_sources
from prunekit.runs.sparsify.run import SparsifyRun, run
from prunekit.runs.structured import planner as structured
from prunekit.runs.texts import own_batches
from prunekit.runs.trained import planner as trained
from tests.support.checkpoints import planned, run_whole_and_stopped, tensors, tokenizer, write
from tests.support.family_configs import model_class, tiny_config
from tests.support.family_trial import find_problems
from tests.support.vision import PROCESSORS, write_lines, write_random, write_rows, write_vision

HALF = {"pattern": "unstructured", "sparsity": 0.5, "propagation": "block"}
ROWS = {"length": 128, "samples": 5}


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return write_vision(tmp_path_factory.mktemp("llava") / "dense", "llava")


def with_images(folder):
    """Return the rows that have images."""
    file = folder / "rows.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    chosen = folder / "chosen.jsonl"
    chosen.write_text("".join(line for line in lines if '"image": null' not in line))
    return chosen


def calibration(file):
    return {"data": str(file), **ROWS}


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("model_type", sorted(PROCESSORS))
def test_masks_are_those_of_hooks_on_the_whole_model(model_type, tmp_path):
    folder = write_vision(tmp_path / "dense", model_type)
    rows = with_images(folder) if model_type == "paligemma" else folder / "rows.jsonl"
    plan = planned(folder, tmp_path / "written", prune=HALF, calibration=calibration(rows))
    list(SparsifyRun(plan).records(resume=False, overwrite=False))
    assert sum("pixel_values" in row for row in plan.images.rows) >= 3
    assert not [*find_problems(type(plan.model), tmp_path, plan, plan.images.rows)]
    # The check sees images: with other ones masks would be others.
    other = [
        {name: -value if name == "pixel_values" else value for name, value in row.items()}
        for row in plan.images.rows
    ]
    assert [*find_problems(type(plan.model), tmp_path, plan, other)]


@pytest.mark.usefixtures("no_page")
def test_a_stopped_run_ends_in_the_same_bytes(llava, tmp_path):
    sections = {
        "calibration": calibration(llava / "rows.jsonl"),
        "prune": {"method": "admm", "pattern": "2:4", "propagation": "stage"},
    }
    whole, stopped = (
        tensors(folder) for folder in run_whole_and_stopped(llava, tmp_path, **sections)
    )
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


@pytest.mark.usefixtures("no_page")
def test_plan_and_report_say_what_was_read(llava, tmp_path):
    plan = planned(llava, tmp_path / "out", calibration=calibration(llava / "rows.jsonl"))
    assert plan.lengths[0] == plan.images.longest
    assert plan.memory.images > plan.images.nbytes
    assert any("vision_tower, " in note and "stay dense" in note for note in plan.notes)
    report = [*run(plan)][-1].values
    assert "5 of 5 rows of dense/rows.jsonl" in report["calibration"]["description"]
    assert report["calibration"]["tokens"] == sum(plan.images.lengths)


def test_ranks_share_the_rows(llava, tmp_path):
    plan = planned(llava, tmp_path / "out", calibration=calibration(llava / "rows.jsonl"))
    rows = [*plan.images.rows]
    assert own_batches(plan.images, plan.device) == rows
    shares = [own_batches(plan.images, plan.device, Ranks(rank, 2)) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 3]
    assert [id(row) for share in shares for row in share] == [id(row) for row in rows]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"calibration": {"data": ["rows.jsonl", "text.jsonl"]}}, "text.jsonl text alone"),
        ({"calibration": {"data": ["missing.jsonl"]}}, "no such file"),
        ({"calibration": {"data": ["rows.jsonl"], "length": 2}}, "each row has more than 2 tokens"),
    ],
)
def test_what_cannot_work_is_refused_in_the_plan(llava, tmp_path, sections, message):
    write_lines(llava / "text.jsonl", [{"text": "a"}])
    write_lines(llava / "missing.jsonl", [{"text": "a", "image": "nowhere.png"}])
    data = sections.get("calibration", {}).get("data", ["rows.jsonl"])
    given = {**calibration("")} | sections.get("calibration", {})
    given["data"] = [str(llava / name) for name in data]
    with pytest.raises(ConfigError, match=message):
        planned(llava, tmp_path / "out", **{**sections, "calibration": given})


def test_a_training_is_refused(llava, tmp_path):
    config = Config.model_validate(
        {
            "model": {"path": str(llava), "device": "cpu"},
            "calibration": calibration(llava / "rows.jsonl"),
            "prune": {"method": "wanda", "pattern": "2:4"},
            "train": {"steps": 2, "held_out": 1},
            "output": {"path": str(tmp_path / "out")},
        }
    )
    with pytest.raises(ConfigError, match="a model is trained on text"):
        trained.plan(config)


def test_a_model_of_text_alone_is_refused(tmp_path):
    folder = write(tmp_path / "dense")
    rows = write_rows(folder)
    with pytest.raises(ConfigError, match="has images, which LlamaForCausalLM does not read"):
        planned(folder, tmp_path / "out", calibration=calibration(rows))


def test_a_folder_without_a_processor_is_refused(tmp_path):
    folder = write_vision(tmp_path / "dense", "llava")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match="has no processor that can be loaded"):
        planned(folder, tmp_path / "out", calibration=calibration(folder / "rows.jsonl"))


def test_units_are_refused(llava, tmp_path):
    config = StructuredConfig.model_validate(
        {
            "model": {"path": str(llava), "device": "cpu"},
            "calibration": calibration(llava / "rows.jsonl"),
            "prune": {"method": "output-norm", "pattern": "heads", "sparsity": 0.5},
            "output": {"path": str(tmp_path / "out")},
        }
    )
    with pytest.raises(ConfigError, match="units are removed on text"):
        structured.plan(config)
    assert image_sources(config) == [str(llava / "rows.jsonl")]


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    config = tiny_config("t5gemma2")
    write_random(model_class("vlm", config), config, tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    rows = write_rows(tmp_path / "dense")
    with pytest.raises(ConfigError, match="T5Gemma2ForConditionalGeneration is none"):
        planned(tmp_path / "dense", tmp_path / "out", calibration=calibration(rows))


PARTS = [(part, model_type) for part in ("vision", "all") for model_type in sorted(PROCESSORS)]


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(("part", "model_type"), PARTS)
def test_masks_of_towers_are_those_of_hooks_on_the_whole_model(part, model_type, tmp_path):
    """Of all, the text reads features of the pruned tower."""
    folder = write_vision(tmp_path / "dense", model_type)
    sections = {
        "prune": HALF,
        "calibration": calibration(with_images(folder)),
        "model": {"part": part},
    }
    plan = planned(folder, tmp_path / "written", **sections)
    list(SparsifyRun(plan).records(resume=False, overwrite=False))
    towers = [name for name in plan.sizes if "vision" in name or "visual" in name]
    assert (len(towers) == len(plan.sizes)) == (part == "vision")
    assert towers
    assert not [*find_problems(type(plan.model), tmp_path, plan, plan.images.rows)]
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "written")
    weights = dict(opened.named_parameters())
    assert all((weights[f"{name}.weight"] == 0).any() for name in towers)


@pytest.mark.usefixtures("no_page")
def test_towers_without_calibration(llava, tmp_path):
    sections = {"calibration": None, "model": {"part": "all"}, "prune": {"method": "magnitude"}}
    plan = planned(llava, tmp_path / "out", **sections)
    assert plan.images is None
    report = [*run(plan)][-1].values
    assert {layer["name"].split(".")[1] for layer in report["layers"]} == {
        "vision_tower",
        "language_model",
    }
    assert all(layer["sparsity"] == 0.5 for layer in report["layers"])
    assert any("multi_modal_projector stays dense" in note for note in plan.notes)


@pytest.mark.usefixtures("no_page")
def test_text_of_the_dense_model_reads_its_dense_tower(llava, tmp_path):
    """The error beside the dense model is that of its own features."""
    sections = {
        "calibration": calibration(with_images(llava)),
        "model": {"part": "all"},
        "prune": {"method": "admm", "pattern": "2:4"},
    }
    whole, stopped = (
        tensors(folder) for folder in run_whole_and_stopped(llava, tmp_path, **sections)
    )
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"calibration": {"data": "text.txt"}}, "is calibrated on images"),
        ({"prune": {"permute": "residual"}}, "prune.permute: is for the text"),
        ({"calibration": {"data": "blank.jsonl"}}, "none of those of a process has an image"),
    ],
)
def test_what_towers_cannot_do_is_refused_in_the_plan(llava, tmp_path, sections, message):
    (llava / "text.txt").write_text("a fox")
    write_lines(llava / "blank.jsonl", [{"text": "a", "image": None}])
    data = sections.get("calibration", {}).get("data", "rows.jsonl")
    given = {"model": {"part": "vision"}} | sections | {"calibration": calibration(llava / data)}
    with pytest.raises(ConfigError, match=message):
        planned(llava, tmp_path / "out", **given)


def test_a_part_that_does_not_exist_is_refused(tmp_path):
    folder = write(tmp_path / "dense")
    with pytest.raises(ConfigError, match='"vision", but LlamaForCausalLM reads no images'):
        planned(folder, tmp_path / "out", model={"part": "vision"})
