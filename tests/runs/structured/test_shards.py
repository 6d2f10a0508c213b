"""A smaller checkpoint written block by block is the one that a whole model in memory gives."""

import shutil
from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest
import torch

import prunekit
from prunekit.checkpoint.journal import read_journal
from prunekit.checkpoint.output import OutputFolder
from prunekit.errors import CheckpointError, NumericsError
from prunekit.models import stock
from prunekit.runs.sparsify.run import run as sparsify
from prunekit.runs.structured.shards import UnitShards
from prunekit.runs.structured.smaller_model import SmallerModel
from tests.support import checkpoints
from tests.support.removals import (
    equal_units,
    removed_from_files,
    removed_in_memory,
    unequal_units,
    unit_plan,
)

ALL = ("blocks", "hidden", "heads", "neurons")
UNITS = ("heads", "neurons")
FLOAT, HALF = torch.float32, torch.bfloat16
RUNS = [
    ("llama", ALL, "uniform", FLOAT, HALF),
    ("llama", UNITS, "unequal", HALF, FLOAT),
    ("qwen2", ("hidden", *UNITS), "unequal", HALF, FLOAT),
    ("gpt2", ("blocks", "neurons"), "uniform", HALF, FLOAT),
    ("gpt2", UNITS, "unequal", FLOAT, HALF),
    ("bert", ("blocks", "neurons"), "uniform", FLOAT, FLOAT),
    ("bert", UNITS, "unequal", HALF, FLOAT),
    ("gpt_neox", ("blocks", "heads"), "unequal", FLOAT, HALF),
    ("t5", ALL, "uniform", HALF, FLOAT),
    ("t5", ("blocks", "heads"), "unequal", FLOAT, HALF),
    ("gemma2", ALL, "uniform", HALF, FLOAT),
    ("gemma2", ("hidden",), "uniform", FLOAT, HALF),
    pytest.param("stablelm", ("blocks", "heads"), "unequal", HALF, FLOAT, marks=pytest.mark.slow),
]
"""Family, kinds, choice of units, data types of the files and of the run."""
CHOICES = {"uniform": equal_units, "unequal": unequal_units}


def assert_same(output, expected):
    """Assert that two folders have the same tensors and config, bit for bit."""
    found, known = checkpoints.tensors(output), checkpoints.tensors(expected)
    assert found.keys() == known.keys()
    for name, value in known.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    assert (output / "config.json").read_text() == (expected / "config.json").read_text()


@pytest.mark.parametrize(("model_type", "kinds", "how", "stored", "computed"), RUNS)
def test_every_family_and_kind(model_type, kinds, how, stored, computed, tmp_path):
    folder = checkpoints.write(tmp_path / "m", model_type, stored)
    plan = unit_plan(folder, tmp_path / "out", kinds, uniform=how == "uniform")
    plan = replace(plan, dtype=computed)
    removals = removed_in_memory(plan, CHOICES[how], tmp_path / "whole")
    steps = [*removed_from_files(plan, removals)]
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert len(steps) > 1
    assert len([*(tmp_path / "out").glob("*.safetensors")]) == 1
    assert torch.isfinite(next(prunekit.load(tmp_path / "out").parameters())).all()
    if how == "uniform":
        stock.open_model(tmp_path / "out")


def test_weights_that_are_tied_by_the_config_only(tmp_path):
    """Scaled embeddings are one factor of the logits with a tied head, and not with another."""
    folder = checkpoints.write(tmp_path / "m", "gemma2")
    held = checkpoints.tensors(folder)
    for name, head in (("equal", held["model.embed_tokens.weight"]), ("own", torch.rand(96, 32))):
        checkpoints.save(folder, held | {"lm_head.weight": head.clone()})
        plan = unit_plan(folder, tmp_path / name, ["hidden"])
        removals = removed_in_memory(plan, equal_units, tmp_path / f"whole-{name}")
        [*removed_from_files(plan, removals)]
        assert_same(tmp_path / name, tmp_path / f"whole-{name}")
    norms = [checkpoints.tensors(tmp_path / name)["model.norm.weight"] for name in ("equal", "own")]
    assert not torch.equal(*norms)


def test_tensors_that_nothing_uses_and_wider_ones(tmp_path):
    """Blocks for multi-token prediction follow the kept ones; nothing unchanged is rounded."""
    folder = checkpoints.write(tmp_path / "m", num_hidden_layers=3)
    held = checkpoints.tensors(folder)
    last = {name: value for name, value in held.items() if ".layers.2." in name}
    held |= {name.replace(".2.", ".3."): value + 1 for name, value in last.items()}
    held["mtp.fc.weight"] = torch.rand(3, 64)
    wide = [name for name in held if "mlp" in name or "norm" in name]
    checkpoints.save(folder, held | {name: held[name].double() * 1.1 for name in wide})
    plan = unit_plan(folder, tmp_path / "out", ["blocks"])
    removals = removed_in_memory(plan, equal_units, tmp_path / "whole")
    [*removed_from_files(plan, removals)]
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.usefixtures("proof_in_process", "no_page")
def test_weights_that_are_stored_compressed_are_cut_as_dense_ones(tmp_path):
    sparse = {"prune": {"method": "magnitude", "pattern": "2:4"}, "output": {"format": "2:4"}}
    folder = checkpoints.write(tmp_path / "dense")
    [*sparsify(checkpoints.planned(folder, tmp_path / "m", calibration=None, **sparse))]
    shutil.copy(folder / "text.txt", tmp_path / "m")
    plan = unit_plan(tmp_path / "m", tmp_path / "out", ["hidden", "neurons"], uniform=True)
    assert plan.checkpoint.compressed
    removals = removed_in_memory(plan, equal_units, tmp_path / "whole")
    [*removed_from_files(plan, removals)]
    assert_same(tmp_path / "out", tmp_path / "whole")


def emptied(groups):
    """Keep no unit of the first group, and some of the others."""
    kept = unequal_units(groups)
    return kept | {groups[0].name: []}


@pytest.mark.parametrize(
    ("model_type", "kinds", "choose", "stored"),
    [
        ("llama", ("hidden", "heads"), unequal_units, FLOAT),
        ("llama", UNITS, unequal_units, HALF),
        ("gpt2", UNITS, emptied, HALF),
        ("t5", UNITS, emptied, FLOAT),
    ],
)
def test_changed_weights_and_a_run_that_stops_after_any_shard(
    model_type, kinds, choose, stored, tmp_path
):
    """Later blocks are changed by the output of earlier ones, as they are written."""
    folder = checkpoints.write(tmp_path / "m", model_type, stored)

    def plan_to(name):
        return unit_plan(folder, tmp_path / name, kinds, uniform=False)

    removals = removed_in_memory(plan_to("out"), choose, tmp_path / "whole", refitted=True)
    steps = [*removed_from_files(plan_to("out"), removals, refitted=True)]
    if stored == FLOAT:  # in memory, changed weights are rounded only at the end
        assert_same(tmp_path / "out", tmp_path / "whole")
    for count in range(1, len(steps), 1 if model_type == "llama" else 3):
        stopped = plan_to(f"stopped{count}")
        with closing(removed_from_files(stopped, removals, refitted=True)) as run:
            assert [*islice(run, count)] == steps[:count]
        assert not (tmp_path / f"stopped{count}/config.json").exists()
        [*removed_from_files(stopped, removals, refitted=True, resume=True)]
        checkpoints.same_bytes(tmp_path / f"stopped{count}", tmp_path / "out")


def test_a_changed_weight_whose_kept_part_is_as_stored_keeps_its_bytes(tmp_path):
    """Where a bias compensates, only the removed columns of a weight are set to 0."""
    folder = checkpoints.write(tmp_path / "m")
    held, name = checkpoints.tensors(folder), "model.layers.1.mlp.down_proj.weight"
    held[name] = held[name].double() * 1.1
    checkpoints.save(folder, held)
    plan = unit_plan(folder, tmp_path / "out", ["neurons"], uniform=True)
    kept = {f"model.layers.{number}.mlp.down_proj": [3, 60] for number in range(2)}
    output = OutputFolder(tmp_path / "out", 0)
    output.begin("same", resume=False, overwrite=False)
    shards = UnitShards(plan, SmallerModel(plan, [("neurons", kept)]), output)
    shards.begin()
    weight = torch.zeros(32, 64)
    weight[:, [3, 60]] = held[name].float()[:, [3, 60]]
    values = shards.write_block(1, None, {name: weight})
    assert values["changed"] == [name]
    assert torch.equal(checkpoints.tensors(tmp_path / "out")[name], held[name][:, [3, 60]])
    output.close()


def test_never_more_than_one_block_is_read_between_shards(tmp_path, monkeypatch):
    folder = checkpoints.write(tmp_path / "m", num_hidden_layers=4)
    plan = unit_plan(folder, tmp_path / "out", ALL, uniform=True)
    removals = removed_in_memory(plan, equal_units, tmp_path / "whole")
    read, counts = [], []
    counted = replace(plan.checkpoint, on_read=lambda _, value: read.append(value.nbytes))
    write_shard = OutputFolder.write_shard

    def counting(output, number, tensors):
        counts.append(sum(read))
        read.clear()
        return write_shard(output, number, tensors)

    monkeypatch.setattr(OutputFolder, "write_shard", counting)
    [*removed_from_files(replace(plan, checkpoint=counted), removals)]
    held = checkpoints.tensors(folder)
    block = sum(value.nbytes for name, value in held.items() if ".layers.0." in name)
    rest = sum(value.nbytes for name, value in held.items() if ".layers." not in name)
    assert counts == [rest] + [block] * (len(counts) - 1)
    assert len(counts) == 1 + len(dict(removals)["blocks"]["model.layers"])


def test_a_shard_that_was_damaged_is_written_again(tmp_path):
    folder = checkpoints.write(tmp_path / "m")
    plan = unit_plan(folder, tmp_path / "out", UNITS, uniform=False)
    removals = removed_in_memory(plan, unequal_units, tmp_path / "whole")
    with closing(removed_from_files(plan, removals)) as run:
        [*islice(run, 3)]
    journal = read_journal(tmp_path / "out/journal.jsonl")
    first = journal["block", "model.layers.0"]["file"]
    (tmp_path / "out" / first).write_bytes(b"cut off")
    [*removed_from_files(plan, removals, resume=True)]
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_a_checkpoint_with_a_broken_weight_is_refused(tmp_path):
    folder = checkpoints.write(tmp_path / "m")
    plan = unit_plan(folder, tmp_path / "out", UNITS, uniform=False)
    removals = removed_in_memory(plan, unequal_units, tmp_path / "whole")
    name = "model.layers.1.mlp.up_proj.weight"
    checkpoints.change(folder, name, lambda weight: weight.fill_(torch.inf))
    with pytest.raises(NumericsError, match=name):
        [*removed_from_files(plan, removals)]


def test_a_checkpoint_without_a_tensor_gets_no_config(tmp_path, monkeypatch):
    folder = checkpoints.write(tmp_path / "m")
    plan = unit_plan(folder, tmp_path / "out", UNITS, uniform=False)
    removals = removed_in_memory(plan, unequal_units, tmp_path / "whole")
    write_shard, name = OutputFolder.write_shard, "model.layers.1.mlp.up_proj.weight"

    def lossy(output, number, tensors):
        return write_shard(output, number, {key: tensors[key] for key in tensors if key != name})

    monkeypatch.setattr(OutputFolder, "write_shard", lossy)
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        [*removed_from_files(plan, removals)]
    assert not (tmp_path / "out/config.json").exists()
