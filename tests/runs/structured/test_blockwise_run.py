"""A run by block writes what a run of the whole model writes, one block in memory."""

import pytest
import torch

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.models.sequential.weights import Weights
from prunekit.runs.structured.blockwise_run import BlockwiseRun
from prunekit.runs.structured.whole_model_run import WholeModelRun
from tests.support import checkpoints
from tests.support.structured import planned

OWN = {"seconds", "memory", "environment", "files", "config", "config_text"}
"""Keys of a report that differ: paths, times, and the number of shards."""
KINDS = 'method = "gradient"\npattern = ["blocks", "hidden", "heads", "neurons"]\n'
TOGETHER = f"{KINDS}sparsity = 0.34\n"
REFITTED = TOGETHER + 'compensate = "refit"\ntruth = true'


def carried_out(run):
    *_, last = run.stoppable_records(resume=False, overwrite=False, stop=lambda: False)
    return last.values


def test_both_kinds_of_run_write_the_same_tensors_and_report(tmp_path, proof_in_process):
    folder = checkpoints.write(tmp_path / "model", num_hidden_layers=3)
    found = {}
    for kind in (WholeModelRun, BlockwiseRun):
        plan = planned(folder, tmp_path / kind.__name__, REFITTED)
        assert plan.by_block
        report = carried_out(kind(plan))
        found[kind] = report, checkpoints.tensors(tmp_path / kind.__name__)
    (whole, dense), (blockwise, streamed) = found.values()
    assert dense.keys() == streamed.keys()
    assert all(torch.equal(value, streamed[name]) for name, value in dense.items())
    for layers in zip(whole["layers"], blockwise["layers"], strict=True):
        if layers[0]["kind"] == "hidden":  # sums over parts of the model in another order
            scores = (torch.tensor(each.pop("scores")) for each in layers)
            torch.testing.assert_close(*scores, rtol=1e-6, atol=0)
            statistics = [each.pop("score_statistics") for each in layers]
            assert statistics[0] == pytest.approx(statistics[1], rel=1e-6)
    assert {key: whole[key] for key in whole.keys() - OWN} == {
        key: blockwise[key] for key in blockwise.keys() - OWN
    }
    configs = [open_checkpoint(tmp_path / kind.__name__).config for kind in found]
    assert configs[0] == configs[1]
    assert whole["files"] == blockwise["files"]
    assert [*whole["files"]] == ["model.safetensors"]


def test_no_more_than_one_block_is_in_memory(tmp_path, monkeypatch, proof_in_process):
    folder = checkpoints.write(tmp_path / "model", num_hidden_layers=3)
    loaded, most = [], []
    load, drop = Weights.load, Weights.drop

    def counted(self, module, **options):
        load(self, module, **options)
        if type(module).__name__.endswith("DecoderLayer"):
            loaded.append(module)
            most.append(len(loaded))

    def dropped(self, module):
        drop(self, module)
        if module in loaded:
            loaded.remove(module)

    monkeypatch.setattr(Weights, "load", counted)
    monkeypatch.setattr(Weights, "drop", dropped)
    carried_out(BlockwiseRun(planned(folder, tmp_path / "out", REFITTED, evaluate=False)))
    assert max(most) <= 2  # leave-one-out of truth runs the blocks after the one it is at
    most.clear()
    carried_out(BlockwiseRun(planned(folder, tmp_path / "other", TOGETHER, evaluate=False)))
    assert set(most) == {1}


@pytest.mark.slow
def test_experts_are_removed_alike_by_both_kinds_of_run(tmp_path, proof_in_process):
    """Files have the matrices of each expert; the model in memory has those of all in one."""
    folder, prune = tmp_path / "model", 'method = "reap"\npattern = "experts"\nsparsity = 0.5'
    checkpoints.write(folder, "mixtral", torch.bfloat16)
    found = []
    for kind in (WholeModelRun, BlockwiseRun):
        plan = planned(folder, tmp_path / kind.__name__, prune)
        report = carried_out(kind(plan))
        kept = {layer["name"]: layer["kept"] for layer in report["layers"]}
        found.append((kept, checkpoints.tensors(tmp_path / kind.__name__)))
        assert report["stock"]
    (kept, whole), (others, streamed) = found
    assert kept == others
    assert whole.keys() == streamed.keys()
    assert all(torch.equal(value, streamed[name]) for name, value in whole.items())
    dense, first = checkpoints.tensors(folder), "model.layers.0.block_sparse_moe"
    for place, number in enumerate(kept["model.layers.0.mlp.experts"]):
        for matrix in ("w1", "w2", "w3"):
            before = dense[f"{first}.experts.{number}.{matrix}.weight"]
            assert torch.equal(whole[f"{first}.experts.{place}.{matrix}.weight"], before)
