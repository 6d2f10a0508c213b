"""Checkpoints that are cut when they are read."""

import pytest
import torch

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import ShapeError
from prunekit.models.empty_model import empty_model
from prunekit.models.units.find import unit_groups
from prunekit.models.units.kinds import Kind
from prunekit.models.units.stored_removal import cut_checkpoint
from prunekit.models.weight_names import stored_names
from tests.support import checkpoints

FLOAT = torch.float32


def test_removals_one_after_the_other_are_one_view_of_the_files(tmp_path):
    folder = checkpoints.write(tmp_path / "m", num_hidden_layers=3)
    held, checkpoint = checkpoints.tensors(folder), open_checkpoint(folder)
    model = empty_model(checkpoint)
    chosen: dict[Kind, list[int]] = {"blocks": [0, 2], "heads": [1], "neurons": [4, 60]}
    for kind, keep in chosen.items():
        groups = unit_groups(model, kind)
        kept = {group.name: keep for group in groups}
        entries = {"num_hidden_layers": 2} if kind == "blocks" else None
        checkpoint, replays = cut_checkpoint(model, checkpoint, groups, kept, entries, FLOAT)
        assert replays.keys() == model.state_dict().keys()
        assert stored_names(model, checkpoint).keys() == replays.keys()  # all shapes are right
    moved, before = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    key = "model.layers.1.self_attn.k_proj.weight"
    read = checkpoint.read([moved, key, "model.norm.weight"])
    assert torch.equal(read[moved], held[before][[4, 60]])
    assert torch.equal(read[key], held["model.layers.2.self_attn.k_proj.weight"][8:])
    assert torch.equal(read["model.norm.weight"], held["model.norm.weight"])
    assert not [name for name in checkpoint.entries if ".layers.2." in name]
    assert checkpoint.views[moved].stored == before
    assert checkpoint.entries[moved].shape == (2, 32)
    assert checkpoint.entries[moved].nbytes == 4 * 2 * 32
    assert "model.norm.weight" not in checkpoint.views


def test_attentions_without_heads_have_no_tensors_but_a_bias(tmp_path):
    folder = checkpoints.write(tmp_path / "m", "gpt2")
    checkpoint = open_checkpoint(folder)
    model = empty_model(checkpoint)
    groups = unit_groups(model, "heads")
    kept = {groups[0].name: [], groups[1].name: [0, 1]}
    cut, _ = cut_checkpoint(model, checkpoint, groups, kept, None, FLOAT)
    gone = checkpoint.entries.keys() - cut.entries.keys()
    assert {name.removeprefix("transformer.") for name in gone} == {
        "h.0.attn.c_attn.weight",
        "h.0.attn.c_attn.bias",
        "h.0.attn.c_proj.weight",
    }


def test_a_part_of_a_tensor_is_not_cut(tmp_path, monkeypatch):
    folder = checkpoints.write(tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    model = empty_model(checkpoint)
    name = "model.layers.0.mlp.up_proj.weight"
    stored = stored_names(model, checkpoint) | {name: f"{name}[0/1, 0:64:1]"}
    place = "prunekit.models.units.stored_removal.stored_names"
    monkeypatch.setattr(place, lambda *_: stored)
    heads = unit_groups(model, "heads")
    kept = {group.name: [0] for group in heads}
    cut_checkpoint(model, checkpoint, heads, kept, None, FLOAT)
    neurons = unit_groups(model, "neurons")
    kept = {group.name: [0] for group in neurons}
    with pytest.raises(ShapeError, match=r"up_proj\.weight\[0/1, 0:64:1\], and only a tensor"):
        cut_checkpoint(model, checkpoint, neurons, kept, None, FLOAT)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_experts_are_renumbered_in_files_that_store_them_one_by_one_or_together(
    model_type, tmp_path
):
    folder = checkpoints.write(tmp_path / "m", model_type)
    held, checkpoint = checkpoints.tensors(folder), open_checkpoint(folder)
    model, together = empty_model(checkpoint), model_type == "gpt_oss"
    groups = unit_groups(model, "experts")
    kept = {groups[0].name: [0, 3], groups[1].name: [1, 2]}
    cut, replays = cut_checkpoint(model, checkpoint, groups, kept, {}, FLOAT)
    assert stored_names(model, cut).keys() == replays.keys()
    prefix = "model.layers.1." + ("mlp." if together else "block_sparse_moe.")
    router = prefix + ("router.weight" if together else "gate.weight")
    read = cut.read(cut.entries)
    assert {name: tuple(value.shape) for name, value in read.items()} == {
        name: entry.shape for name, entry in cut.entries.items()
    }
    assert torch.equal(read[router], held[router][[1, 2]])
    if together:
        name = f"{prefix}experts.down_proj"
        assert torch.equal(read[name], held[name][[1, 2]])
    else:
        assert torch.equal(
            read[f"{prefix}experts.1.w2.weight"], held[f"{prefix}experts.2.w2.weight"]
        )
        assert f"{prefix}experts.2.w2.weight" not in read
