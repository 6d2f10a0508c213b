"""Blocks that run again for their gradients."""

import pytest
import torch

from prunekit.training.activation_checkpoints import checkpointed
from tests.support.architectures import tiny


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_gradients_are_the_same_and_each_block_runs_twice(family):
    model = tiny(family).eval()
    ids = torch.arange(12).view(2, 6)
    first = (".0.self_attn", ".0.attn", ".0.layer.0")
    runs = []
    for name, module in model.named_modules():
        if name.endswith(first):
            module.register_forward_hook(lambda *_: runs.append(1))
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: each.grad.clone() for name, each in model.named_parameters()}
    model.zero_grad()
    once = len(runs)
    with checkpointed(model):
        loss = model(input_ids=ids, labels=ids).loss
    assert all("forward" not in vars(each) for each in model.modules())
    loss.backward()
    assert once
    assert len(runs) == 3 * once
    assert model.config.use_cache
    for name, each in model.named_parameters():
        torch.testing.assert_close(each.grad, expected[name], msg=name)


def test_without_gradients_blocks_run_once():
    model = tiny("llama").eval()
    runs = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    with checkpointed(model), torch.no_grad():
        model(torch.arange(6)[None])
    assert runs == [1]
