"""Whole runs on tiny models: records, output, resuming after any stop."""

import json
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import prunekit
from prunekit.checkpoint import output
from prunekit.checkpoint.output import JOURNAL
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.checkpoint.weight_files import INDEX_FILE
from prunekit.cli.main import main
from prunekit.errors import ConfigError, NumericsError
from prunekit.runs.sparsify import shards
from prunekit.sparsify.block_pruner import BlockPruner
from tests.support import checkpoints
from tests.support.architectures import tiny
from tests.support.checkpoints import planned, same_bytes
from tests.support.tiers import often

BLOCKS = 3
SPARSEGPT = {"method": "sparsegpt", "pattern": "2:4"}

pytestmark = pytest.mark.usefixtures("no_page")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return checkpoints.write(folder, num_hidden_layers=BLOCKS, tie_word_embeddings=True)


def judged(folder):
    return {"data": str(folder / "text.txt"), "length": 12, "windows": 2}


@pytest.fixture(scope="module")
def finished(llama, tmp_path_factory):
    """A run that nothing stopped: its folder and its records."""
    folder = tmp_path_factory.mktemp("run") / "out"
    plan = planned(llama, folder, prune=SPARSEGPT, evaluate=judged(llama))
    return folder, list(prunekit.run(plan))


def start(llama, folder, *, resume=False, overwrite=False, **sections):
    sections = {"prune": SPARSEGPT, "evaluate": judged(llama), **sections}
    return prunekit.run(planned(llama, folder, **sections), resume=resume, overwrite=overwrite)


# Records and files of a run


def test_records_come_in_the_order_of_the_contract(finished, llama):
    folder, records = finished
    layers = 7
    expected = [("start", 1), ("phase", 1), ("evaluation", 1), ("phase", 1)]
    expected += [("layer", layers), ("block", 1)] * BLOCKS
    expected += [("phase", 2), ("evaluation", 1), ("phase", 1), ("finish", 1)]
    runs = []
    for record in records:
        if runs and runs[-1][0] == record.kind:
            runs[-1] = (record.kind, runs[-1][1] + 1)
        else:
            runs.append((record.kind, 1))
    assert runs == expected
    phases = [record for record in records if record.kind == "phase"]
    assert [(phase.name, phase.values["steps"]) for phase in phases] == [
        ("evaluate before", 1),
        ("prune", BLOCKS),
        ("export", 1),
        ("evaluate after", 1),
        ("verify", 1),
    ]
    assert records[0].values == {"blocks": BLOCKS, "linears": BLOCKS * layers, "tokens": 48}
    assert records[-1].name == str(folder)
    before, after = (record.values for record in records if record.kind == "evaluation")
    assert (before["which"], after["which"]) == ("before", "after")
    assert before["value"] != after["value"]


def test_a_survey_is_a_phase_of_its_own(llama, tmp_path):
    prune = {"method": "wanda", "pattern": "unstructured", "sparsity": 0.5, "allocation": "owl"}
    records = start(llama, tmp_path / "out", prune=prune, evaluate=None)
    phases = [record.name for record in records if record.kind == "phase"]
    assert phases == ["survey", "prune", "export", "verify"]


KEYS = {
    "": ["prunekit", "config", "seed", "environment"],
    "model": ["architecture", "parameters"],
    "sparsity": ["target", "achieved"],
    "layers": ["name", "shape", "sparsity", "relative_error", "seconds"],
    "evaluation": ["data", "metric", "before", "after", "protocol"],
    "seconds": ["calibrate", "prune", "evaluate", "write", "total"],
    "memory": ["peak_rss_bytes", "peak_device_bytes"],
}


@pytest.mark.parametrize("place", KEYS)
def test_the_report_has_every_key_of_the_contract(finished, place):
    folder, records = finished
    report = json.loads((folder / "report.json").read_text())
    assert report == json.loads(json.dumps(records[-1].values))
    found = report[place] if place else report
    for table in found if isinstance(found, list) else [found]:
        assert set(KEYS[place]) <= table.keys()
        assert all(table[key] is not None for key in KEYS[place])


def test_what_the_report_says_is_true(finished, llama):
    folder, _ = finished
    report = json.loads((folder / "report.json").read_text())
    held, dense = checkpoints.tensors(folder), checkpoints.tensors(llama)
    zeros = 0
    for layer in report["layers"]:
        weight = held[layer["tensor"]]
        assert list(weight.shape) == layer["shape"]
        assert int((weight == 0).sum()) / weight.numel() == layer["sparsity"] == 0.5
        zeros += int((weight == 0).sum())
    assert report["sparsity"]["zeros"] == zeros
    assert report["sparsity"]["achieved"] == report["sparsity"]["target"] == 0.5
    assert report["sparsity"]["violations"] == 0
    assert report["model"]["parameters"] == sum(value.numel() for value in dense.values())
    assert report["model"]["architecture"] == "LlamaForCausalLM"
    assert report["config"]["prune"]["method"] == "sparsegpt"
    assert report["calibration"]["tokens"] == 48
    assert report["seconds"]["total"] > 0
    assert report["memory"]["peak_rss_bytes"] > 2**20


def test_what_is_not_pruned_is_copied_byte_for_byte(finished, llama):
    folder, records = finished
    pruned = {layer["tensor"] for layer in records[-1].values["layers"]}
    held, dense = checkpoints.tensors(folder), checkpoints.tensors(llama)
    assert held.keys() == dense.keys()
    for name, value in dense.items():
        assert torch.equal(held[name], value) == (name not in pruned)
    for file in open_checkpoint(llama).companions:
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        (llama / "config.json").read_text()
    )


def test_nothing_is_pickled_and_a_model_that_fits_is_one_file(finished):
    folder, _ = finished
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    kinds = {path.suffix for path in folder.iterdir()}
    assert kinds == {".safetensors", ".json", ".jsonl", ".html", ".csv", ".md"}


def test_a_larger_model_is_files_of_the_size_asked_for(finished, llama, tmp_path):
    folder, limit = tmp_path / "out", 60_000
    list(start(llama, folder, output={"max_shard_size": "60KB"}))
    index = json.loads((folder / INDEX_FILE).read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == [path.name for path in files]
    assert all(sum(t.nbytes for t in load_file(file).values()) <= limit for file in files)
    held, expected = checkpoints.tensors(folder), checkpoints.tensors(finished[0])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in held)


STOCK = {
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "gpt_neox": AutoModelForCausalLM,
    "gemma3_text": AutoModelForCausalLM,
    "opt": AutoModelForCausalLM,
    "bert": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
}


@pytest.mark.parametrize("model_type", STOCK)
def test_stock_transformers_opens_what_was_written_and_answers_the_same(tmp_path, model_type):
    folder = checkpoints.write(tmp_path / "m", model_type)
    *_, finish = prunekit.run(planned(folder, tmp_path / "out", prune=SPARSEGPT))
    opened, notes = STOCK[model_type].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model = tiny(model_type)
    written = checkpoints.tensors(tmp_path / "out")
    for layer in finish.values["layers"]:
        model.get_parameter(f"{layer['name']}.weight").data = written[layer["tensor"]]
    ids = torch.arange(3, 20)[None]
    inputs = {"input_ids": ids, "labels": ids}
    with torch.inference_mode():
        assert torch.equal(opened(**inputs).logits, model(**inputs).logits)


def test_tied_weights_stay_tied(finished):
    folder, _ = finished
    assert "lm_head.weight" not in checkpoints.tensors(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_biases_buffers_and_tensors_that_nobody_knows_are_kept(tmp_path):
    folder = checkpoints.write(tmp_path / "m", "gpt2", torch.bfloat16)
    extra = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8).tril(),
        "old.counts": torch.arange(5),
        "old.scale": torch.tensor(3.0),
    }
    checkpoints.save(folder, load_file(checkpoints.single(folder)) | extra)
    list(prunekit.run(planned(folder, tmp_path / "out")))
    held, dense = checkpoints.tensors(tmp_path / "out"), checkpoints.tensors(folder)
    assert held.keys() == dense.keys()
    for name, value in dense.items():
        assert held[name].dtype == value.dtype
        if value.dim() != 2 or "wte" in name or "wpe" in name:
            assert torch.equal(held[name], value)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_type_that_is_asked_for_is_that_of_every_float(tmp_path, dtype):
    folder = checkpoints.write(tmp_path / "m")
    extra = {"old.counts": torch.arange(5)}
    checkpoints.save(folder, load_file(checkpoints.single(folder)) | extra)
    checkpoints.configure(folder, dtype=None, torch_dtype="float32")
    list(prunekit.run(planned(folder, tmp_path / "out", model={"dtype": dtype})))
    held, kind = checkpoints.tensors(tmp_path / "out"), getattr(torch, dtype)
    assert {value.dtype for value in held.values()} == {kind, torch.int64}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype
    assert "torch_dtype" not in config
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == kind


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_type_stays_unless_another_is_asked_for(tmp_path, dtype):
    folder = checkpoints.write(tmp_path / "m", dtype=dtype)
    list(prunekit.run(planned(folder, tmp_path / "out")))
    assert {value.dtype for value in checkpoints.tensors(tmp_path / "out").values()} == {dtype}


def test_sparsity_0_writes_every_tensor_as_it_was(tmp_path):
    folder = checkpoints.write(tmp_path / "m", dtype=torch.bfloat16)
    prune = {"pattern": "unstructured", "sparsity": 0}
    list(prunekit.run(planned(folder, tmp_path / "out", prune=prune)))
    held = checkpoints.tensors(tmp_path / "out")
    for name, value in checkpoints.tensors(folder).items():
        assert torch.equal(held[name].view(torch.int16), value.view(torch.int16))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(finished, llama, tmp_path):
    list(start(llama, tmp_path / "same"))
    same_bytes(tmp_path / "same", finished[0])
    other = start(llama, tmp_path / "other", calibration={"seed": 1})
    list(other)
    name = "model.safetensors"
    assert (tmp_path / "other" / name).read_bytes() != (finished[0] / name).read_bytes()


def test_an_empty_text_is_refused_before_anything_is_written(llama, tmp_path):
    text = tmp_path / "empty.txt"
    text.write_text("words")
    records = start(llama, tmp_path / "out", calibration={"data": str(text)})
    text.write_text("")
    with pytest.raises(ConfigError, match=rf"^{text}"):
        next(records)
    assert not (tmp_path / "out").exists()


def test_a_text_shorter_than_a_sample_is_one_short_sample(llama, tmp_path):
    (tmp_path / "short.txt").write_text("abcde")
    text = {"data": str(tmp_path / "short.txt"), "length": 40}
    *_, finish = start(llama, tmp_path / "out", calibration=text, evaluate=text)
    assert finish.values["calibration"]["length"] == 5
    assert "5 tokens" in finish.values["evaluation"][0]["protocol"]
    assert finish.values["sparsity"]["achieved"] == 0.5


def test_a_method_that_looks_at_weights_alone_needs_no_text(llama, tmp_path):
    prune = {"method": "magnitude"}
    *_, finish = start(llama, tmp_path / "out", prune=prune, calibration=None, evaluate=None)
    assert finish.values["calibration"] is None
    assert finish.values["sparsity"]["achieved"] == 0.5


# Where it writes


def test_a_folder_that_holds_something_is_refused(finished, llama):
    folder, _ = finished
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"is not empty; --resume continues it, --overwrite s"):
        list(start(llama, folder))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["thesis.txt", JOURNAL])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_that_is_not_ours_is_never_touched(llama, tmp_path, name, options):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).write_text('{"mine": 1}\n')
    with pytest.raises(ConfigError, match=r"[Cc]hoose another"):
        list(start(llama, folder, **options))
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, '{"mine": 1}\n')]


def test_a_file_in_the_way_is_refused(llama, tmp_path):
    (tmp_path / "out").write_text("mine")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ConfigError, match=r"^output\.path"):
            list(start(llama, tmp_path / "out", **options))
    assert (tmp_path / "out").read_text() == "mine"


def test_overwriting_removes_the_run_before_and_nothing_else(finished, llama, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "out")
    (folder / "notes.md").write_text("mine")
    (folder / "results").mkdir()
    (folder / "results/table.csv").write_text("mine")
    other = folder / "model-00001-of-00009.safetensors"
    (folder / "report.json").write_text(json.dumps({"files": {other.name: "0", "../up": "0"}}))
    other.touch()
    (tmp_path / "up").touch()
    records = list(start(llama, folder, overwrite=True))
    assert not other.exists()
    assert (tmp_path / "up").exists()
    assert (folder / "notes.md").read_text() == (folder / "results/table.csv").read_text() == "mine"
    note, *_ = records[-1].values["notes"]
    assert note.endswith("--overwrite left what prunekit did not write: notes.md, results")
    same_bytes(folder, finished[0])


def test_an_empty_folder_and_missing_parents_are_fine(llama, tmp_path):
    (tmp_path / "out").mkdir()
    next(start(llama, tmp_path / "out"))
    next(start(llama, tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b" / JOURNAL).is_file()


def test_a_disk_that_fails_midway_leaves_a_resumable_folder(finished, llama, tmp_path, monkeypatch):
    folder, real = tmp_path / "out", output.write_shard

    def fail(file, tensors):
        if "00003-of" in file.name:
            raise OSError(30, "Read-only file system")
        return real(file, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(output, "write_shard", fail)
        with pytest.raises(OSError, match="Read-only"):
            list(start(llama, folder))
    assert not (folder / "config.json").exists()
    list(start(llama, folder, resume=True))
    same_bytes(folder, finished[0])


# Stopped and resumed


@pytest.mark.parametrize("after", [False, True], ids=["before it is noted", "after"])
@pytest.mark.parametrize("moment", range(14))
def test_a_run_stopped_at_any_entry_of_the_journal_ends_with_the_same_bytes(
    finished, llama, tmp_path, monkeypatch, moment, after
):
    folder, real, count = tmp_path / "out", output.OutputFolder.append_journal, []

    def stop(self, kind, name, values):
        count.append(kind)
        if len(count) == moment + 1 and not after:
            raise KeyboardInterrupt
        real(self, kind, name, values)
        if len(count) == moment + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output.OutputFolder, "append_journal", stop)
        with pytest.raises(KeyboardInterrupt):
            list(start(llama, folder))
    records = list(start(llama, folder, resume=True))
    same_bytes(folder, finished[0])
    expected = Counter(record.kind for record in finished[1])
    assert Counter(record.kind for record in records) == expected
    mine, theirs = records[-1].values, finished[1][-1].values
    assert [layer["relative_error"] for layer in mine["layers"]] == [
        layer["relative_error"] for layer in theirs["layers"]
    ]
    for key in ("sparsity", "evaluation", "proof"):
        assert mine[key] == theirs[key]


SECTIONS = {
    "stage, half precision": {"model": {"dtype": "float16"}, "prune": {"propagation": "stage"}},
    "owl": {
        "prune": {
            "method": "wanda",
            "pattern": "unstructured",
            "sparsity": 0.6,
            "allocation": "owl",
            "steps": 2,
        }
    },
    "dense target": {"prune": {"method": "admm", "iterations": 3}},
}


OFTEN = [("llama", "stage, half precision"), ("gpt2", "owl"), ("t5", "dense target")]


@pytest.mark.parametrize(
    ("model_type", "recipe"), often(product(["llama", "gpt2", "t5"], SECTIONS), OFTEN)
)
def test_other_recipes_resume_as_well(tmp_path, model_type, recipe):
    folder, sections = checkpoints.write(tmp_path / "m", model_type), SECTIONS[recipe]
    list(prunekit.run(planned(folder, tmp_path / "whole", **sections)))
    records = prunekit.run(planned(folder, tmp_path / "out", **sections))
    blocks = 0
    for record in records:
        blocks += record.kind == "block"
        if blocks == 1 and record.kind == "layer":
            records.close()
    list(prunekit.run(planned(folder, tmp_path / "out", **sections), resume=True))
    same_bytes(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("cut", ["half a line", "nothing but a line feed", "zeros"])
def test_a_journal_that_a_crash_cut_off_is_read_up_to_there(finished, llama, tmp_path, cut):
    folder = shutil.copytree(finished[0], tmp_path / "out")
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    ends = {"half a line": lines[5][:20], "nothing but a line feed": b"\n", "zeros": b"\0" * 9}
    (folder / JOURNAL).write_bytes(b"".join(lines[:5]) + ends[cut])
    for name in ("config.json", "report.json", "report.html"):
        (folder / name).unlink()
    (folder / ".shard-00004-of-00004.safetensors.tmp").write_bytes(b"half a shard")
    list(start(llama, folder, resume=True))
    same_bytes(folder, finished[0])
    assert all(json.loads(line) for line in (folder / JOURNAL).read_text().splitlines())


@pytest.mark.parametrize("kept", [0, 7])
def test_a_run_killed_as_it_began_is_begun_again(finished, llama, tmp_path, kept):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / JOURNAL).write_bytes((finished[0] / JOURNAL).read_bytes()[:kept])
    list(start(llama, folder, resume=True))
    same_bytes(folder, finished[0])


OTHERS = {
    "sparsity": {"prune": {"method": "sparsegpt", "pattern": "1:4"}},
    "seed": {"calibration": {"seed": 3}},
    "type": {"model": {"dtype": "float16"}},
}


@pytest.mark.parametrize("sections", OTHERS.values(), ids=OTHERS)
def test_another_config_does_not_resume(finished, llama, tmp_path, sections):
    folder = shutil.copytree(finished[0], tmp_path / "out")
    with pytest.raises(ConfigError, match="was begun with another config, model, calibration"):
        list(start(llama, folder, resume=True, **sections))
    same_bytes(folder, finished[0])


def test_a_cpu_that_runs_blocks_in_another_type_does_not_resume(llama, tmp_path):
    folder = tmp_path / "out"
    list(prunekit.run(planned(llama, folder)))
    elsewhere = replace(planned(llama, folder), dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="with blocks in another data type"):
        list(prunekit.run(elsewhere, resume=True))


def test_another_text_or_model_does_not_resume(finished, llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "m")
    folder = tmp_path / "out"
    list(start(model, folder))
    list(start(model, folder, resume=True))
    (model / "text.txt").write_text("another text, of another length. " * 20)
    with pytest.raises(ConfigError, match="was begun with another"):
        list(start(model, folder, resume=True))
    shutil.copy(llama / "text.txt", model)
    save_file(load_file(checkpoints.single(model)), checkpoints.single(model))
    with pytest.raises(ConfigError, match="was begun with another"):
        list(start(model, folder, resume=True))


def test_resuming_what_was_never_begun_begins(finished, llama, tmp_path):
    list(start(llama, tmp_path / "out", resume=True))
    same_bytes(tmp_path / "out", finished[0])


def test_resuming_a_finished_run_changes_no_weight(finished, llama, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    list(start(llama, folder, resume=True))
    same_bytes(folder, finished[0])
    assert times == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_numbers_that_go_wrong_midway_leave_a_resumable_folder(
    finished, llama, tmp_path, monkeypatch
):
    folder, real = tmp_path / "out", BlockPruner._prune_weights

    def fail(self, block, dense, *rest):
        if any(linear.name == "model.layers.1.mlp.up_proj" for linear in dense):
            raise NumericsError("model.layers.1.mlp.up_proj: no damping saves it.")
        return real(self, block, dense, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(BlockPruner, "_prune_weights", fail)
        with pytest.raises(NumericsError, match="up_proj"):
            list(start(llama, folder))
    assert [path.name[:11] for path in sorted(folder.glob("*.safetensors"))] == [
        "shard-00001",
        "shard-00002",
    ]
    list(start(llama, folder, resume=True))
    same_bytes(folder, finished[0])


CONFIG = """\
[model]
path = "{model}"
device = "cpu"
[calibration]
data = "{model}/text.txt"
samples = 4
length = 12
[prune]
method = "sparsegpt"
pattern = "2:4"
[evaluate]
data = "{model}/text.txt"
length = 12
windows = 2
[output]
path = "{output}"
"""


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(
    finished, llama, tmp_path, monkeypatch, capsys
):
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(model=llama, output=tmp_path / "out"))
    real = shards.ShardWriter.write_block

    def interrupt(self, number, *rest, **options):
        if number == 1:
            signal.raise_signal(signal.SIGINT)
        return real(self, number, *rest, **options)

    # Where tests run in the background of a shell, Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "write_block", interrupt)
        assert main(["run", str(config), "--quiet"]) == 130
    signal.signal(signal.SIGINT, before)
    assert f"prunekit run {config} --resume" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()
    assert main(["run", str(config), "--quiet", "--resume"]) == 0
    same_bytes(tmp_path / "out", finished[0])


RUN = """
from prunekit.cli import main as cli
code = cli.main(["run", *arguments, "--quiet"])
"""


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(llama, tmp_path, fork_server):
    config, seed, trials, kills = tmp_path / "config.toml", random.randrange(2**32), 2, 0
    config.write_text(CONFIG.format(model=llama, output=tmp_path / "out"))
    chance = random.Random(seed)
    fork_server.start(tmp_path / "said", 1, RUN, config).succeed()  # is the first to import
    began = time.monotonic()
    fork_server.start(tmp_path / "said", 1, RUN, config, "--overwrite").succeed()
    whole = time.monotonic() - began
    for trial in range(trials):
        given = config, "--resume", "--set", f"output.path={tmp_path / 'out'}-{trial}"
        for _ in range(2):
            world = fork_server.start(tmp_path / "said", 1, RUN, *given)
            time.sleep(chance.uniform(0, whole))
            world.kill(0, signal.SIGKILL)
            kills += world.wait() == [-signal.SIGKILL]
        fork_server.start(tmp_path / "said", 1, RUN, *given).succeed()
    assert kills > 0, f"seed {seed}"
    for trial in range(trials):
        same_bytes(tmp_path / f"out-{trial}", tmp_path / "out")
