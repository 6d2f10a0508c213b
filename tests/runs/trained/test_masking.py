"""Zeros of a model that was pruned before are kept while an optimizer trains it."""

import torch

from prunekit.models.load import load
from prunekit.runs.trained.masking import kept_zeros, prune_once
from tests.support import checkpoints
from tests.support.trained import planned


def test_zeros_of_experts_that_are_stored_together_are_kept(tmp_path):
    folder = checkpoints.write(tmp_path / "model", "mixtral")
    plan = planned(folder, tmp_path / "out", {"sparsity": 0.5, "skip": ["*.k_proj"]})
    model = load(folder, torch.float32)
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(1))
    records = prune_once(plan, model, [{"input_ids": ids}])
    names = [record.name for record in records]
    assert len(names) == 1 + len(plan.sizes)
    zeros = {name: value == 0 for name, value in model.named_parameters() if value.ndim > 1}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with kept_zeros(plan, model, optimizer) as kept:
        before = kept.achieved
        assert any("experts.gate_up_proj" in name for name in kept.masks.weights)
        assert not any("k_proj" in name for name in kept.masks.weights)
        for _ in range(3):
            model(input_ids=ids).logits.square().mean().backward()
            optimizer.step()
        assert (kept.achieved, kept.sparsity, kept.done) == (before, 0.5, True)
    for name, value in model.named_parameters():
        if name in kept.masks.weights:
            assert torch.equal(value == 0, zeros[name]), name
    model(input_ids=ids).logits.square().mean().backward()
    optimizer.step()
    assert kept.achieved < before
