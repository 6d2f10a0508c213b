"""Tensors and config that a structured run writes, for models of all kinds of blocks."""

import json
import shutil

import pytest
import torch

import prunekit
from prunekit.errors import ShapeError
from prunekit.models.units.blocks import block_groups
from prunekit.models.units.narrowing import STORED
from prunekit.runs.structured.written import config_changes, restore_stored
from tests.support import checkpoints
from tests.support.architectures import HYBRID, tiny
from tests.support.structured import planned
from tests.support.tiers import often

BLOCKS = 'method = "magnitude"\npattern = "blocks"\nsparsity = 0.25'
NEURONS = 'method = "magnitude"\npattern = "neurons"\nsparsity = 0.25\nuniform = true'
IDS = torch.arange(3, 12)[None]

TWICE = ("granitemoehybrid", "lfm2", "nemotron_h", "qwen3_next")
"""Types from whose output a block is removed again."""
OFTEN = ("lfm2", "nemotron_h")
"""Types whose configs list, or spell, what kind each block is."""

pytestmark = pytest.mark.usefixtures("proof_in_process", "no_page")


@torch.no_grad()
def logits_with(model, units):
    """Return the logits of a model whose other blocks pass their input through."""

    def bypass(_, args, given, out):
        x = args[0] if args else given["hidden_states"]
        return (x, *out[1:]) if isinstance(out, tuple) else x

    (group,) = block_groups(model)
    closed = [block for unit, block in enumerate(group.blocks) if unit not in units]
    hooks = [block.register_forward_hook(bypass, with_kwargs=True) for block in closed]
    logits = model(IDS, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


def finished(folder, output, prune):
    """Execute a plan and return the config of its output."""
    assert [*prunekit.run(planned(folder, output, prune, evaluate=False))][-1].kind == "finish"
    return json.loads((output / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", often(sorted(HYBRID), OFTEN))
def test_blocks_of_several_kinds_move_with_all_their_tensors(model_type, tmp_path):
    """Without the first block every kind is in the place of another one; of some, once more.

    Of nemotron_h, the second removal leaves the only block with attention, which scores lowest.
    """
    model = tiny(model_type, **HYBRID[model_type])
    (group,) = block_groups(model)
    with torch.no_grad():
        for unit, block in enumerate(group.blocks):
            for parameter in block.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter)).mul_([1e-3, 1e-2, 1, 1][unit])
    folder = checkpoints.write(tmp_path / "model")
    model.save_pretrained(folder)
    units = [0, 1, 2, 3]
    for sparsity in ("0.25", "0.34")[: 1 + (model_type in TWICE)]:
        out = tmp_path / sparsity
        finished(folder, out, BLOCKS.replace("0.25", sparsity))
        (layer,) = json.loads((out / "report.json").read_text())["layers"]
        units = [units[kept] for kept in layer["kept"]]
        opened, notes = type(model).from_pretrained(out, output_loading_info=True)
        assert not notes["missing_keys"]
        assert not notes["unexpected_keys"]
        with torch.no_grad():
            found = opened.eval()(IDS, use_cache=False).logits
        assert torch.equal(found, logits_with(model, units))
        shutil.copyfile(folder / "text.txt", out / "text.txt")
        folder = out
    assert units[0] in {1, 2}
    assert len(units) == 3 - (model_type in TWICE)
    assert 1 in units or model_type != "nemotron_h"


def test_the_last_block_with_attention_cannot_be_removed():
    model = tiny("nemotron_h")
    (group,) = groups = block_groups(model)
    with pytest.raises(ShapeError, match="no block with attention would be left"):
        group.stock_entries(model, groups, {group.name: [0, 2, 3]}, {})


def test_keys_of_other_versions_and_aliases_do_not_contradict(tmp_path):
    folder = checkpoints.write(tmp_path / "model", "nemotron_h")
    checkpoints.configure(folder, hybrid_override_pattern="M*M-", num_hidden_layers=4)
    plan = planned(folder, tmp_path / "out", BLOCKS, evaluate=False)
    before = plan.model.config.to_dict()
    kinds = before["layers_block_type"][1:]
    kept = {plan.groups["blocks"][0].name: [1, 2, 3]}
    changed, dropped = config_changes(plan, before, before | {"layers_block_type": kinds}, kept)
    assert changed == {
        "layers_block_type": kinds,
        "hybrid_override_pattern": "*M-",
        "num_hidden_layers": 3,
    }
    assert dropped == []
    stale = plan.checkpoint.config
    stale["layer_types"] = before["layers_block_type"]  # another name of the entry
    assert config_changes(plan, before, before | {"layers_block_type": kinds}, kept)[1] == [
        "layer_types"
    ]


def test_weights_that_do_not_change_keep_their_bytes_and_tied_ones_stay_two(tmp_path):
    """A CPU computes in float32; rounding what is stored in float64 would be a loss."""
    folder = checkpoints.write(tmp_path / "model", tie_word_embeddings=True)
    held = checkpoints.tensors(folder)
    held["model.norm.weight"] = torch.rand(32, dtype=torch.float64)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    checkpoints.save(folder, held)
    finished(folder, tmp_path / "out", NEURONS)
    found = checkpoints.tensors(tmp_path / "out")
    assert found.keys() == held.keys()
    assert torch.equal(found["model.norm.weight"], held["model.norm.weight"])
    assert torch.equal(found["lm_head.weight"], held["lm_head.weight"])


@pytest.mark.parametrize("pattern", ["neurons", "hidden"])
def test_parts_of_weights_that_are_stored_wider_are_not_rounded(tmp_path, pattern):
    """A GPU computes in bfloat16 where most weights are, a CPU in float32."""
    folder = checkpoints.write(tmp_path / "model", num_hidden_layers=2)
    held = checkpoints.tensors(folder)
    wide = [name for name in held if "mlp" in name]
    held |= {name: torch.rand(held[name].shape, dtype=torch.float64) for name in wide}
    checkpoints.save(folder, held)
    prune = f'method = "magnitude"\npattern = "{pattern}"\nsparsity = 0.25\nuniform = true'
    finished(folder, tmp_path / "out", prune)
    found = checkpoints.tensors(tmp_path / "out")
    for name in wide:
        known = {*held[name].flatten().tolist()}
        assert found[name].shape != held[name].shape
        assert found[name].dtype == torch.float64
        assert known.issuperset(found[name].flatten().tolist())


def test_training_begins_with_the_stored_values(tmp_path):
    model = tiny("llama").bfloat16()
    weight = model.model.layers[0].mlp.up_proj.weight
    wide = weight.detach().float() * (1 + 2**-12)
    setattr(weight, STORED, wide)
    frozen = model.model.norm.weight
    setattr(frozen, STORED, wide[0, :32] + 1)
    model.float()
    restore_stored(model, torch.bfloat16)
    assert torch.equal(weight, wide)
    assert torch.equal(frozen, torch.ones(32))  # another value than the stored one


def test_blocks_for_multi_token_prediction_follow_the_kept_ones(tmp_path):
    folder = checkpoints.write(tmp_path / "model", num_hidden_layers=4)
    held = checkpoints.tensors(folder)
    last = {name: value for name, value in held.items() if ".layers.3." in name}
    extra = {name.replace(".3.", ".4."): value + 1 for name, value in last.items()}
    extra["mtp.fc.weight"] = torch.rand(32, 64)
    checkpoints.save(folder, held | extra)
    config = finished(folder, tmp_path / "out", BLOCKS)
    found = checkpoints.tensors(tmp_path / "out")
    assert config["num_hidden_layers"] == 3
    for name, value in extra.items():
        assert torch.equal(found[name.replace(".4.", ".3.")], value)
    assert len(found) == len(held) - len(last) + len(extra)


def test_a_model_in_shards_is_read_and_written_whole(llama, tmp_path):
    folder = checkpoints.write(
        tmp_path / "model", num_hidden_layers=3, num_key_value_heads=4, shard_size="40KB"
    )
    assert len([*folder.glob("*.safetensors")]) > 2
    for source, name in ((folder, "shards"), (llama, "one")):
        finished(source, tmp_path / name, BLOCKS.replace("0.25", "0.34"))
    found, expected = (checkpoints.tensors(tmp_path / name) for name in ("shards", "one"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
