"""The engine of schedules: which steps count, and what is due when."""

import pytest
import torch
from torch import nn

from prunekit.allocations.schedules import PruneSchedule
from prunekit.errors import ConfigError
from prunekit.structured.scheduled import ScheduledPruner, step_was_skipped, torch_optimizer


class Recorded(ScheduledPruner):
    """Records what it is asked to do."""

    def __init__(self, model, optimizer, schedule, **settings):
        super().__init__(model, optimizer, schedule, **settings)
        self.calls = []

    @property
    def achieved(self):
        return self.calls[-1][1] if self.calls else 0.0

    def _is_exact(self):
        return self.achieved == self.sparsity

    def _prune(self, sparsity):
        self.calls.append((self.step, sparsity))

    def _regrow(self):
        self.calls.append((self.step, "regrown"))


def training(schedule, **settings):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, Recorded(model, optimizer, schedule, **settings)


def train(model, optimizer, steps):
    for _ in range(steps):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()


def test_it_prunes_at_the_due_steps_alone():
    schedule = PruneSchedule("linear", 0.6, 7, 1, 4)
    model, optimizer, pruner = training(schedule)
    assert pruner.due == (5, 7)
    train(model, optimizer, 6)
    assert (pruner.due, pruner.done) == ((7,), False)
    train(model, optimizer, 4)
    assert pruner.calls == [(5, pytest.approx(0.4)), (7, 0.6)]
    assert pruner.done
    assert pruner.step == 10


def test_what_is_due_at_step_0_is_done_once_before_the_first_forward():
    model, optimizer, pruner = training(PruneSchedule("linear", 0.6, 2, 0, 1, 0.2))
    assert pruner.due == (0, 1, 2)
    model(torch.ones(1, 2))
    assert pruner.calls == [(0, 0.2)]
    train(model, optimizer, 3)
    assert pruner.calls == [(0, 0.2), (1, 0.4), (2, 0.6)]


def test_it_regrows_strictly_between_start_and_end_where_it_does_not_prune():
    schedule = PruneSchedule("one-shot", 0.6, 6, 0, 1, 0.6)
    model, optimizer, pruner = training(schedule, regrow=0.1, regrow_every=2)
    train(model, optimizer, 8)
    assert pruner.calls == [(0, 0.6), (2, "regrown"), (4, "regrown"), (6, 0.6)]


def test_after_its_end_it_does_nothing():
    model, optimizer, pruner = training(PruneSchedule("cubic", 0.5, 2))
    with pruner:
        train(model, optimizer, 1)
    train(model, optimizer, 3)
    assert (pruner.step, pruner.calls) == (1, [(1, 0.4375)])
    assert not model._forward_pre_hooks


def test_a_state_continues_and_one_of_other_settings_is_refused():
    schedule = PruneSchedule("cubic", 0.5, 4)
    model, optimizer, pruner = training(schedule)
    train(model, optimizer, 2)
    state = pruner.state_dict()
    model, optimizer, other = training(schedule)
    other.load_state_dict(state)
    assert (other.step, other.sparsity, other.due) == (2, pruner.sparsity, (3, 4))
    model, optimizer, wrong = training(PruneSchedule("linear", 0.5, 4))
    with pytest.raises(ConfigError, match="a pruner with the settings"):
        wrong.load_state_dict(state)
    assert wrong.step == 0


def test_the_optimizer_is_found_inside_of_wrappers():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.optimizer = inner

    assert torch_optimizer(Wrapper(optimizer)) is optimizer
    with pytest.raises(ConfigError, match=r"is not a torch\.optim\.Optimizer"):
        torch_optimizer([])


def test_a_step_of_a_fused_optimizer_is_skipped_where_it_found_an_infinity():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert not step_was_skipped(optimizer)
    for found in (0.0, 1.0):
        optimizer.found_inf = torch.tensor(found)
        assert step_was_skipped(optimizer) == bool(found)
