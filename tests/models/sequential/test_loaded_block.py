"""A loaded block: hidden states advance exactly once, and fields are constant."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from prunekit.models.sequential import pipeline
from tests.support.architectures import tiny
from tests.support.blocks import loaded_blocks


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setitem(pipeline.BATCH_TOKENS, "cpu", 24)


def counted(module):
    """Return a list with one entry per call of a module."""
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(0))
    return calls


def test_propagates_once_however_often_it_is_called(ids):
    model = tiny("llama")
    calls = counted(model.model.layers[1])
    for loaded in loaded_blocks(model, ids):
        if loaded.index == 1:
            batches = len(loaded.hidden)
            with torch.no_grad():
                expected = [call() for call in loaded.calls()]
            for _ in range(2):
                loaded.propagate()
                assert all(map(torch.equal, loaded.hidden, expected))
    assert len(calls) == 2 * batches


def test_does_not_run_where_nobody_reads_its_output(ids):
    model = tiny("llama")
    calls = [counted(layer) for layer in model.model.layers]
    embedded = len(list(loaded_blocks(model, ids, outputs_read="none"))[-1].hidden)
    # Embedding also runs the first block, to record the structure of its output.
    assert [len(each) for each in calls] == [embedded, 0]
    list(loaded_blocks(model, ids, outputs_read="by-next-block"))
    assert [len(each) for each in calls] == [3 * embedded, 0]


def test_batches_that_were_computed_on_the_way_count_as_propagated(ids):
    model = tiny("llama")
    loaded = next(loaded_blocks(model, ids))
    calls = counted(model.model.layers[0])
    outputs = [hidden + 1 for hidden in loaded.hidden]
    for batch, output in enumerate(outputs):
        loaded.advance_batch(batch, output)
    loaded.propagate()
    assert not calls
    assert all(map(torch.equal, loaded.hidden, outputs))


def test_the_dense_model_runs_its_own_copy_after_a_fork(ids):
    model = tiny("llama")
    plain = [*loaded_blocks(tiny("llama"), ids)][-1].hidden
    for loaded in loaded_blocks(model, ids, with_dense=True):
        loaded.fork_dense()
        assert loaded.dense.module is not loaded.module
        with torch.no_grad():
            loaded.module.mlp.down_proj.weight.zero_()
    assert all(map(torch.equal, loaded.dense.hidden, plain))
    assert not any(map(torch.equal, loaded.hidden, plain))


def test_settled_modules_do_not_run_again_until_stages_end(ids):
    model = tiny("llama")
    loaded = next(loaded_blocks(model, ids, with_dense=True))
    loaded.fork_dense()
    batches = len(loaded.hidden)
    mine, dense = (counted(stream.module.self_attn.q_proj) for stream in loaded.streams)
    loaded.begin_stages([["self_attn.o_proj"], ["mlp.down_proj"]])
    loaded.run()
    assert len(mine) == batches
    loaded.settle_stage()
    for stream in loaded.streams:
        stream.run()
        stream.run()
    # The first batch shows that attention ends with its linear, whose inputs are cached.
    assert len(mine) == batches + 1
    assert len(dense) == batches  # in the dense model no inputs were cached before
    loaded.end_stages()
    loaded.run()
    assert len(mine) == 2 * batches + 1


def test_a_detached_block_has_the_weights_and_no_hidden_states(ids):
    model = tiny("llama")
    loaded = next(loaded_blocks(model, ids))
    kept = loaded.detached()
    assert kept.module is not loaded.module
    assert kept.name == loaded.name
    pairs = zip(kept.module.parameters(), loaded.module.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)
    assert not kept.hidden
    kept.propagate()


def test_inputs_and_order_of_modules(ids):
    loaded = next(loaded_blocks(tiny("llama"), ids))
    paths = ["mlp.down_proj", "self_attn.q_proj", "mlp.up_proj"]
    assert loaded.execution_order(paths) == [paths[1], paths[2], paths[0]]
    inputs = [*loaded.inputs_of("self_attn.q_proj")]
    norm = loaded.module.input_layernorm
    with torch.no_grad():
        assert all(map(torch.equal, inputs, map(norm, loaded.hidden)))


def test_its_fields_cannot_be_assigned(ids):
    loaded = next(loaded_blocks(tiny("llama"), ids))
    with pytest.raises(FrozenInstanceError):
        loaded.output_is_read = False
