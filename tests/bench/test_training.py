"""The bench of pruning while training: its schedule, its hand-made loop, its page."""

from dataclasses import replace

import torch
from transformers.pytorch_utils import Conv1D

from bench.training import unit_traps
from bench.training.contestants import by_hand, torch_masks
from bench.training.page import page
from bench.training.task import Ask, cubic, due_steps, sparsity
from bench.training.unit_contestants import ours
from tests.support.architectures import tiny


def row(contestant, perplexity, seed=0):
    return {
        "contestant": contestant, "steps": 200, "sparsity": 0.8, "seed": seed,
        "perplexity": perplexity, "seconds": 9.6,
    }  # fmt: skip


def test_the_page_has_means_of_seeds_and_the_lowest_in_bold():
    rows = [row("by hand", 12.0), row("ours", 10.0), row("ours", 11.0, seed=1)]
    text = page({"model": "m", "dense": 8.0, "rows": rows, "cost": [], "traps": []})
    assert "| contestant | 200 steps, 80% |" in text
    assert "| by hand | 12.00, 10 s |" in text
    assert "| ours | **10.50** ± 0.71 (2), 10 s |" in text
    assert "Known mistakes" not in text


def test_traps_of_weights_and_of_units_are_two_tables():
    traps = [
        {"trap": "a", "by hand": "no: b", "ours": "yes"},
        {"trap": "c", "others": "not installed", "ours": "yes"},
    ]
    libraries = {"torch-pruning": "1.6.1"}
    found = {"model": "m", "dense": 8.0, "rows": [], "cost": []}
    text = page(found | {"traps": traps, "libraries": libraries})
    assert (
        "|  | by hand | ours |\n|---|---|---|\n| a | no: b | yes |\n\n|  | others | ours |" in text
    )
    assert "torch-pruning 1.6.1." in text


def test_neurons_cut_at_the_end_of_a_schedule_avoid_all_traps_of_units(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(unit_traps, "MODEL", tmp_path)
    assert [trap(ours) for trap in unit_traps.TRAPS] == [unit_traps.YES] * len(unit_traps.TRAPS)

    def forgetful(model, batches, ask):
        done = ours(model, batches, ask)
        return replace(done, optimizer=torch.optim.AdamW([torch.ones(1, requires_grad=True)]))

    wrong = (unit_traps.all_are_trained, unit_traps.state_is_kept, unit_traps.none_is_held)
    assert [trap(forgetful)[:3] for trap in wrong] == ["no:"] * 3


def test_the_end_of_a_schedule_is_due_where_it_is_no_multiple():
    ask = Ask(0.7, end=7, every=3)
    assert [*due_steps(ask)] == [3, 6, 7]
    assert cubic(7, ask) == 0.7


def test_the_other_contestants_prune_as_much_as_asked_for():
    """So that the comparison is of equals: exactly as many zeros, at the end and afterwards."""
    for attach in (by_hand, torch_masks):
        torch.manual_seed(0)
        model = torch.nn.Sequential(Conv1D(20, 10), Conv1D(10, 20))
        optimizer = torch.optim.AdamW(model.parameters())
        with attach(model, optimizer, Ask(0.7, end=4, every=3)) as after_step:
            for _ in range(6):
                model(torch.randn(3, 10)).square().sum().backward()
                optimizer.step()
                after_step()
        assert sparsity(model) == 0.7
