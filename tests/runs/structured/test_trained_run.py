"""A training after the removal of units: ranked by block, trained in memory."""

import pytest
import torch
from transformers import LlamaConfig

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.config.load import load_config
from prunekit.distributed.ranks import Ranks
from prunekit.errors import ConfigError
from prunekit.runs import jobs
from prunekit.runs.structured import planner
from prunekit.runs.structured.trained_run import TrainedRun
from prunekit.runs.structured.whole_model_run import WholeModelRun
from prunekit.training.chosen_parameters import chosen_parameters
from tests.runs.structured.test_blockwise_run import carried_out
from tests.support import checkpoints
from tests.support.structured import write_config

KINDS = 'method = "gradient"\npattern = ["blocks", "hidden", "heads", "neurons"]\nsparsity = 0.34\n'
REFITTED = f'{KINDS}compensate = "refit"\n'
TRAIN = "[train]\nheld_out = 2\nsteps = 4\nbatch = 2\n"


def planned(folder, out, prune, train=TRAIN, *overrides):
    path = write_config(folder, out, prune)
    path.write_text(path.read_text() + train)
    return jobs.plan(load_config(path, overrides))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_trained_weights_are_those_of_a_run_with_the_whole_model(
    family, tmp_path, proof_in_process
):
    folder, prune = tmp_path / "model", REFITTED
    if family == "llama":
        checkpoints.write(folder, num_hidden_layers=3)
    else:  # files have the matrices of each expert, and the model those of all in one
        checkpoints.write(folder, family)
        prune = 'method = "reap"\npattern = "experts"\nsparsity = 0.5'
    found = []
    for kind in (WholeModelRun, TrainedRun):
        plan = planned(folder, tmp_path / kind.__name__, prune)
        assert plan.by_block
        report = carried_out(kind(plan))
        found.append((report["training"], checkpoints.tensors(tmp_path / kind.__name__)))
    (history, whole), (other, streamed) = found
    dense = checkpoints.tensors(folder)
    assert history == other
    assert whole.keys() == streamed.keys()
    assert all(torch.equal(value, streamed[name]) for name, value in whole.items())
    name = next(name for name in streamed if name.endswith("norm.weight"))
    assert not torch.equal(streamed[name], dense[name][: len(streamed[name])])
    configs = [
        open_checkpoint(tmp_path / kind.__name__).config for kind in (WholeModelRun, TrainedRun)
    ]
    assert configs[0] == configs[1]


def test_weights_that_are_frozen_are_written_as_they_were_stored(tmp_path, proof_in_process):
    folder = checkpoints.write(tmp_path / "model", dtype=torch.bfloat16)
    adapter = '[train.adapter]\nrank = 2\ntargets = ["value"]\n'
    prune = 'method = "output-norm"\npattern = "neurons"\nsparsity = 0.5\ncompensate = "refit"'
    options = TRAIN + adapter, "calibration.hidden=disk"
    made = planned(folder, tmp_path / "out", prune, *options)
    assert made.where == "disk"
    carried_out(TrainedRun(made))
    dense, trained = checkpoints.tensors(folder), checkpoints.tensors(tmp_path / "out")
    changed = {
        name.rpartition("layers.")[2][2:]
        for name, value in trained.items()
        if value.shape == dense[name].shape and not torch.equal(value, dense[name])
    }
    assert changed == {"self_attn.v_proj.weight"}  # and what reads neurons, which is narrower
    assert {value.dtype for value in trained.values()} == {torch.bfloat16}


def test_routers_are_trained_alone(tmp_path, proof_in_process):
    folder = checkpoints.write(tmp_path / "model", "mixtral")
    prune = 'method = "reap"\npattern = "experts"\nsparsity = 0.5'
    plan = planned(folder, tmp_path / "out", prune, TRAIN + 'only = ["routers"]\n')
    trained = plan.memory["training"] + plan.memory["model"] - 4 * plan.parameters
    routers = sum(each.numel() for each in chosen_parameters(plan.model, ["routers"]))
    assert trained == 5 * 4 * routers
    report = carried_out(TrainedRun(plan))
    dense, written = checkpoints.tensors(folder), checkpoints.tensors(tmp_path / "out")
    for number, layer in enumerate(report["layers"]):
        moe = f"model.layers.{number}.block_sparse_moe"
        for place, expert in enumerate(layer["kept"]):
            for matrix in ("w1", "w2", "w3"):
                name = f"{moe}.experts.{{}}.{matrix}.weight"
                assert torch.equal(written.pop(name.format(place)), dense[name.format(expert)])
        gate = written.pop(f"{moe}.gate.weight")
        assert not torch.equal(gate, dense[f"{moe}.gate.weight"][layer["kept"]])
    assert all(torch.equal(value, dense[name]) for name, value in written.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tied_weights_that_are_stored_twice_are_written_twice(dtype, tmp_path, proof_in_process):
    folder = checkpoints.write(tmp_path / "model", dtype=dtype, tie_word_embeddings=True)
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
    held = checkpoints.tensors(folder)
    checkpoints.save(folder, held | {head: held[embeddings].clone()})
    prune = 'method = "magnitude"\npattern = "neurons"\nsparsity = 0.5'
    carried_out(TrainedRun(planned(folder, tmp_path / "out", prune)))
    written = checkpoints.tensors(tmp_path / "out")
    assert torch.equal(written[embeddings], written[head])
    assert not torch.equal(written[head], held[embeddings])


def test_a_bias_that_a_refit_leaves_is_written_as_stored(tmp_path, monkeypatch, proof_in_process):
    """On a GPU, which computes in bfloat16 as most weights are stored."""
    folder = checkpoints.write(tmp_path / "model", dtype=torch.bfloat16, mlp_bias=True)
    held = checkpoints.tensors(folder)
    biases = {name: torch.randn(each.shape) for name, each in held.items() if "bias" in name}
    checkpoints.save(folder, held | biases)
    monkeypatch.setattr(planner, "loss_dtype", lambda stored, device: stored)
    adapter = '[train.adapter]\nrank = 2\ntargets = ["query"]\n'
    prune = 'method = "output-norm"\npattern = "neurons"\nsparsity = 0.5\ncompensate = "refit"'
    carried_out(TrainedRun(planned(folder, tmp_path / "out", prune, TRAIN + adapter)))
    written = checkpoints.tensors(tmp_path / "out")
    down = [name for name in biases if "down_proj" in name]
    assert down
    assert all(torch.equal(written[name], biases[name]) for name in down)


def test_a_training_that_was_stopped_goes_on(tmp_path, proof_in_process):
    folder = checkpoints.write(tmp_path / "model", num_hidden_layers=3)
    train = TRAIN.replace("steps = 4", "steps = 4\nevery = 1\nsave_every = 1")
    carried_out(TrainedRun(planned(folder, tmp_path / "whole", REFITTED, train)))
    for last in ("refit", "train"):
        made = planned(folder, tmp_path / last, REFITTED, train)
        records = TrainedRun(made).stoppable_records(
            resume=False, overwrite=False, stop=lambda: False
        )
        phase, steps = "", 0
        for record in records:
            steps = 0 if record.kind == "phase" else steps + (record.kind == "step")
            phase = record.name if record.kind == "phase" else phase
            if phase == last and steps == 2:
                break
        records.close()
        *_, done = TrainedRun(planned(folder, tmp_path / last, REFITTED, train)).stoppable_records(
            resume=True, overwrite=False, stop=lambda: False
        )
        assert done.kind == "finish"
        whole, resumed = (checkpoints.tensors(tmp_path / each) for each in ("whole", last))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_parts_that_a_model_lacks_are_not_trained_alone(llama, tmp_path):
    with pytest.raises(ConfigError, match=r"train.only: LlamaForCausalLM has no routers"):
        planned(llama, tmp_path / "out", REFITTED, TRAIN + 'only = ["routers"]\n')
    adapter = "[train.adapter]\nrank = 1\n"
    with pytest.raises(ConfigError, match="an adapter is trained alone"):
        planned(llama, tmp_path / "out", REFITTED, TRAIN + 'only = ["norms"]\n' + adapter)


def test_the_plan_has_the_memory_of_the_phase_that_needs_most(llama, tmp_path):
    few = planned(llama, tmp_path / "out", REFITTED)
    assert few.memory["model"] == 4 * few.parameters
    assert few.memory["training"] == 4 * 4 * few.parameters  # gradient, moments, best value
    adapter = '[train.adapter]\nrank = 1\ntargets = ["value"]\n'
    ranking = planned(llama, tmp_path / "out", REFITTED, TRAIN.replace("2\n", "1\n") + adapter)
    assert "hidden states" in ranking.memory
    assert ranking.memory["model"] == 4 * ranking.parameters  # it takes the refitted weights
    assert ranking.place.device == sum(ranking.memory.values())


LLAMA_7B = LlamaConfig(num_attention_heads=32, dtype="bfloat16", architectures=["LlamaForCausalLM"])
"""Llama-2-7B, by the defaults of its config."""


@pytest.mark.parametrize(("size", "device", "host"), [(1, 36.9e9, 78.3e9), (8, 46.3e9, 3.13e9)])
def test_adapters_of_7b_are_trained_on_gpus_of_80_gigabytes(tmp_path, size, device, host):
    """The figures of the README."""
    LLAMA_7B.save_pretrained(tmp_path / "7b")
    (tmp_path / "7b/text.txt").write_text("text")
    prune = (
        'method = "hybrid"\npattern = ["heads", "neurons"]\nsparsity = 0.3\ncompensate = "refit"\n'
    )
    adapter = '[train.adapter]\nrank = 8\ntargets = ["query", "value"]\n'
    train = "[train]\nbatch = 1\ncheckpoint_activations = true\n" + adapter
    path = write_config(tmp_path / "7b", tmp_path / "out", prune, evaluate=False)
    path.write_text(path.read_text() + train)
    overrides = ["calibration.samples=128", "calibration.length=2048"]
    config = load_config(path, overrides)
    made = jobs.plan(config, Ranks(0, size), jobs.Preflight(80 * 10**9, 128 * 10**9))
    assert made.place.device == pytest.approx(device, rel=0.01)
    assert made.place.host == pytest.approx(host, rel=0.01)


def test_hidden_states_beside_the_device_do_not_hide_that_a_training_has_to_be_sharded(tmp_path):
    LLAMA_7B.save_pretrained(tmp_path / "7b")
    (tmp_path / "7b/text.txt").write_text("text")
    path = write_config(tmp_path / "7b", tmp_path / "out", KINDS, evaluate=False)
    path.write_text(path.read_text() + "[train]\nbatch = 1\ncheckpoint_activations = true\n")
    for samples in (128, 4096):
        overrides = [f"calibration.samples={samples}", "calibration.length=2048"]
        config = load_config(path, [*overrides, 'prune.pattern=["heads", "neurons"]'])
        made = jobs.plan(config, Ranks(0, 8), jobs.Preflight(80 * 10**9, 10**12))
        assert made.sharded
        assert made.place.device < 80 * 10**9
