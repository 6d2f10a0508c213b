"""Shards: restored blocks have the same weights, and the rest is unchanged."""

import pytest
import torch
import transformers

from prunekit.checkpoint import adapter
from prunekit.checkpoint.journal import JOURNAL, read_journal
from prunekit.errors import CheckpointError, NumericsError
from prunekit.models.sequential.pipeline import load_blocks
from prunekit.runs.sparsify.run import SparsifyRun, run
from prunekit.runs.sparsify.shards import ShardWriter, compressed_layouts
from tests.support import checkpoints
from tests.support.adapters import PEFT_WARNS
from tests.support.checkpoints import planned, same_bytes, tensors

pytestmark = pytest.mark.usefixtures("no_page", "proof_in_process")


@pytest.fixture(scope="module", params=["dense", "2:4"])
def finished(request, tmp_path_factory):
    """Return the plan, output folder and report of a finished run."""
    folder = tmp_path_factory.mktemp("shards")
    model = checkpoints.write(folder / "m")
    prune = {"method": "wanda", "pattern": "2:4"}
    plan = planned(model, folder / "out", prune=prune, output={"format": request.param})
    return plan, folder / "out", [*run(plan)][-1].values


def test_a_written_block_is_restored_to_the_same_weights(finished):
    plan, folder, report = finished
    again = SparsifyRun(plan)
    again.output.journal = read_journal(folder / JOURNAL)
    layers = [layer for layer in report["layers"] if layer["block"] == 1]
    (loaded,) = load_blocks(plan.stacks, again.weights, {1})
    again.shards.restore_block(loaded, 1, layers)
    assert layers
    for layer in layers:
        weight = loaded.module.get_submodule(layer["name"].removeprefix(f"{loaded.name}.")).weight
        assert float((weight == 0).float().mean()) == layer["sparsity"] == 0.5
        if "stored" not in layer:
            assert torch.equal(weight, tensors(folder)[layer["tensor"]])


def test_layouts_are_of_the_layers_that_are_compressed(finished):
    plan, _, report = finished
    layouts = compressed_layouts(report["layers"])
    compressed = plan.config.output.format != "dense"
    assert len(layouts) == compressed * len(report["layers"])
    assert all(f"{name}.weight" in plan.checkpoint.entries for name in layouts)


FOREIGN = {
    "a.scale": torch.arange(4).to(torch.float8_e4m3fn),
    "b.freqs": torch.tensor([1 + 2j, 3j]),
    "c.codes": torch.tensor([2**31, 7], dtype=torch.uint32),
    "d.half": torch.tensor([0.5, torch.inf]).half(),
}
BY_WEIGHT = {"method": "magnitude", "pattern": "2:4"}


def test_tensors_that_nothing_uses_are_the_same_bytes_whatever_their_type(tmp_path):
    folder = checkpoints.write(tmp_path / "m", dtype=torch.bfloat16)
    checkpoints.save(folder, tensors(folder) | FOREIGN)
    list(run(planned(folder, tmp_path / "out", calibration=None, prune=BY_WEIGHT)))
    written = tensors(tmp_path / "out")
    for name, value in FOREIGN.items():
        assert written[name].dtype == value.dtype, name
        assert torch.equal(written[name].view(torch.uint8), value.view(torch.uint8)), name


def test_nan_outside_of_the_blocks_ends_a_run_that_needs_no_text(tmp_path):
    folder = checkpoints.write(tmp_path / "m")
    checkpoints.change(
        folder,
        "model.embed_tokens.weight",
        lambda rows: rows.index_fill_(0, torch.tensor([95]), torch.nan),
    )
    records = run(planned(folder, tmp_path / "out", calibration=None, prune=BY_WEIGHT))
    with pytest.raises(NumericsError, match=r"model\.embed_tokens\.weight: 32 of its 3072 values"):
        list(records)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_first_shard_holds_what_is_outside_blocks(finished):
    plan, folder, _ = finished
    outside = {name for name in plan.checkpoint.entries if ".layers." not in name}
    again = SparsifyRun(plan)
    again.output.journal = read_journal(folder / JOURNAL)
    written, source = again.output.read_shard(1), plan.checkpoint.read(outside)
    assert written.keys() == outside
    assert all(torch.equal(value, source[name]) for name, value in written.items())


LOW_RANK = {"method": "wanda", "pattern": "2:4", "recover": "lowrank", "recover_rank": 2}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Return the model, output folder and report of a finished run with an adapter."""
    folder = tmp_path_factory.mktemp("adapted")
    model = checkpoints.write(folder / "m")
    report = [*run(planned(model, folder / "out", prune=LOW_RANK))][-1].values
    return model, folder / "out", report


def test_an_adapter_is_one_of_the_files_of_a_run(adapted):
    _, folder, report = adapted
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
    assert report["files"].keys() == found
    assert f"{adapter.FOLDER}/{adapter.FILE}" in found


@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
@pytest.mark.parametrize("whole", [True, False], ids=["merged", "of a block"])
def test_a_damaged_adapter_is_made_again(adapted, tmp_path, whole, how):
    """Each weight that an adapter makes up for is pruned again with it."""
    model, expected, _ = adapted
    records = run(planned(model, tmp_path / "out", prune=LOW_RANK))
    if whole:
        assert [*records][-1].kind == "finish"
        damaged = tmp_path / "out" / adapter.FOLDER / adapter.FILE
    else:
        next(record for record in records if record.kind == "block")
        records.close()
        (damaged,) = (tmp_path / "out" / adapter.FOLDER).glob("*.safetensors")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content[: -5 if how == "cut" else None])
    if how == "delete":
        damaged.unlink()
    [*run(planned(model, tmp_path / "out", prune=LOW_RANK), resume=True)]
    same_bytes(tmp_path / "out", expected)
    same_bytes(tmp_path / "out" / adapter.FOLDER, expected / adapter.FOLDER)


def test_a_block_pruned_again_after_the_merge_is_merged_again(adapted, tmp_path):
    model, expected, _ = adapted
    [*run(planned(model, tmp_path / "out", prune=LOW_RANK))]
    (tmp_path / "out/model.safetensors").unlink()
    [*run(planned(model, tmp_path / "out", prune=LOW_RANK), resume=True)]
    same_bytes(tmp_path / "out", expected)
    same_bytes(tmp_path / "out" / adapter.FOLDER, expected / adapter.FOLDER)


def test_a_checkpoint_without_a_tensor_gets_no_config(adapted, tmp_path, monkeypatch):
    read = ShardWriter._read
    lacking = "model.layers.1.input_layernorm.weight"
    monkeypatch.setattr(
        ShardWriter,
        "_read",
        lambda self, names: read(self, [name for name in names if name != lacking]),
    )
    with pytest.raises(CheckpointError, match=f"has no {lacking}"):
        [*run(planned(adapted[0], tmp_path / "out"))]
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.filterwarnings(*PEFT_WARNS)
def test_peft_opens_an_adapter_with_its_base_by_itself(adapted, tmp_path):
    peft = pytest.importorskip("peft")
    _, folder, _ = adapted
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(folder / adapter.FOLDER)
    config = alone.peft_config["default"]
    assert config.task_type == "CAUSAL_LM"
    assert config.base_model_name_or_path == str(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    both = peft.PeftModel.from_pretrained(base, folder, subfolder=adapter.FOLDER)
    tokens = torch.arange(12)[None]
    assert torch.equal(alone(tokens).logits, both(tokens).logits)
