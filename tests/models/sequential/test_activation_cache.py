"""Cached module outputs: the same results per stage, without rerunning modules."""

import pytest
import torch
from torch import nn

import prunekit
from prunekit.models.sequential import pipeline
from prunekit.models.sequential.activation_cache import ActivationCache
from prunekit.models.sequential.hidden_states import MmapStates
from prunekit.sparsify import block_tuning
from tests.support.architectures import TINY, tiny
from tests.support.tiers import DISTINCT, often

SECTIONS = {
    "by stage": {"method": "sparsegpt", "propagation": "stage"},
    "in steps": {"method": "sparsegpt", "propagation": "stage", "steps": 2},
    "dense target": {"method": "admm", "iterations": 3},
    "tuned": {"method": "wanda", "target": "dense", "recover": "block"},
}
CHOSEN = [("t5", "in steps"), ("llama", "dense target"), ("t5", "dense target"), ("llama", "tuned")]
"""Model types and sections that are tested in each run of all tests."""


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Split samples into three batches, the last one smaller; tune in a few steps."""
    monkeypatch.setitem(pipeline.BATCH_TOKENS, "cpu", 36)
    monkeypatch.setattr(block_tuning, "STEPS", 9)


def pruned(model_type, section):
    model = tiny(model_type)
    ids = torch.randint(3, 60, (10, 9), generator=torch.Generator().manual_seed(1))
    entries = prunekit.prune(model, ids, pattern="unstructured", sparsity=0.5, **section)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    return model.state_dict(), [entry["relative_error"] for entry in entries]


@pytest.mark.parametrize(
    ("model_type", "section"),
    often(
        [(model_type, "by stage") for model_type in TINY]
        + [(model_type, name) for model_type in ("llama", "t5") for name in list(SECTIONS)[1:]],
        [*((model_type, "by stage") for model_type in DISTINCT), *CHOSEN],
    ),
)
def test_models_are_the_same_as_without(model_type, section, monkeypatch):
    found, errors = pruned(model_type, SECTIONS[section])
    monkeypatch.setattr(ActivationCache, "around", lambda *arguments: arguments[-1])
    expected, others = pruned(model_type, SECTIONS[section])
    assert errors == others
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("target", "runs"), [("layer", 3 + 1), ("dense", 2 * 3 + 1)])
def test_attention_is_run_once_a_batch_and_once_to_see_what_it_is(target, runs, monkeypatch):
    from torch.nn import functional

    calls, plain = [], functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda *arguments, **given: calls.append(0) or plain(*arguments, **given),
    )
    section = {"method": "sparsegpt", "target": target, "propagation": "stage"}
    pruned("llama", section)
    embeddings, layers = 3, 2  # embedding also runs the first block, for its output structure
    assert len(calls) == embeddings + layers * runs


class Part(nn.Module):
    """Two linears, followed by a given function."""

    def __init__(self, after):
        super().__init__()
        self.first, self.second, self.after = nn.Linear(4, 4), nn.Linear(4, 4), after
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return self.after(self.second(self.first(x).tanh()))


class Block(nn.Module):
    """A ``Part``, an in-place change of its output, and a linear."""

    def __init__(self, after):
        super().__init__()
        self.part, self.last = Part(after), nn.Linear(4, 4)

    def forward(self, x):
        given = self.part(x)
        first = given[0] if isinstance(given, tuple) else given
        first += 1
        return self.last(first) + x


STAGES = [["part.first"], ["part.second"], ["last"]]
AFTER = {
    "nothing": (lambda x: x, 1),
    "a tuple": (lambda x: (x, None), 1),
    "a product": (lambda x: 2 * x, 2),
    "another shape": (lambda x: x[None], 4),
    "two tensors": (lambda x: (x, x.sum()), 4),
}


@pytest.mark.parametrize("shelf", ["list", "disk"])
@pytest.mark.parametrize("after", AFTER)
def test_a_part_is_run_as_often_as_what_it_does_at_its_end_needs(after, shelf, tmp_path):
    torch.manual_seed(0)
    function, again = AFTER[after]
    block, plain = Block(function).eval(), Block(function).eval()
    plain.load_state_dict(block.state_dict())
    place = list if shelf == "list" else lambda: MmapStates(torch.device("cpu"), tmp_path)
    cache = ActivationCache(block, STAGES, place)
    batches = torch.randn(2, 3, 5, 4)
    with torch.no_grad():
        for stage in range(4):
            cache.stage = stage
            for number, x in enumerate(batches):
                call = cache.around(number, x, lambda x=x: block(x.clone()))
                assert torch.equal(call(), plain(x.clone()))
            if stage < 3:  # stands for pruning
                for each in (block, plain):
                    each.get_submodule(STAGES[stage][0]).weight *= 0.5
    # Two runs before it settles; then the first batch shows whether it ends with its linear.
    assert block.part.runs == 4 + again


class Around(nn.Module):
    """A block that combines a part's output and a linear by ``how``."""

    def __init__(self, how):
        super().__init__()
        self.part, self.last, self.how = Part(lambda x: x), nn.Linear(4, 4), how

    def forward(self, x):
        return self.how(x, self.part(x.tanh()), self.last)


WAYS = {
    "added": (lambda x, given, last: x + given + last(x + given), True),
    "added, and dead beside it": (lambda x, given, last: x + given + 0 * last(x + given), True),
    "parallel, and dead beside it": (lambda x, given, last: x + given + 0 * last(x), False),
    "nothing": (lambda x, given, last: x + 0 * given + last(x), False),
    "scaled": (lambda x, given, last: x + 0.5 * given + last(x + 0.5 * given), False),
    "parallel": (lambda x, given, last: x + given + last(x), False),
    "alone": (lambda x, given, last: given + last(given), False),
    "read, not added": (lambda x, given, last: x + last(x + given), False),
}


@pytest.mark.parametrize("shelf", ["list", "disk"])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_what_is_only_added_takes_the_place_of_what_was_read(way, shelf, tmp_path):
    torch.manual_seed(0)
    how, folds = WAYS[way]
    place = list if shelf == "list" else lambda: MmapStates(torch.device("cpu"), tmp_path)
    traits = {}
    for _ in range(2):  # a block and its copy, which share the traits observed in the first
        block, hidden, given = Around(how).eval(), place(), torch.randn(3, 2, 5, 4)
        hidden.extend(given.clone())
        cache = ActivationCache(block, STAGES, place, traits)

        def calls(block=block, hidden=hidden, cache=cache):
            for number, x in enumerate(hidden):
                yield cache.around(number, x, lambda x=x: block(x))

        if not traits["part"].adds:
            cache.probe_residual_adds(given[0, :1], lambda x, block=block: lambda: block(x))
        for cache.stage in range(2):
            for call in calls():
                call()
        cache.stage, runs = 2, block.part.runs
        cache.fold_into_hidden(hidden)
        found = [call() for call in calls()]
        assert all(map(torch.equal, found, map(block, given)))
        sums = [x + block.part(x.tanh()) for x in given]
        assert all(map(torch.equal, hidden, sums if folds else given))
        # The reference runs alone are counted: the cached input of the last linear suffices.
        assert block.part.runs - runs == 2 * len(given)


class Core(nn.Module):
    """A complete block in a single module."""

    def __init__(self):
        super().__init__()
        self.part, self.last = Part(lambda x: x), nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.part(x)
        return x + self.last(x)


@torch.no_grad()
def test_a_part_of_one_that_settles_later_is_not_folded():
    torch.manual_seed(0)
    block, hidden = nn.Sequential(Core()).eval(), [*torch.randn(3, 2, 5, 4)]
    expected = [block(x) for x in hidden]
    cache = ActivationCache(block, [["0.part.first"], ["0.part.second"], ["0.last"]])

    def calls():
        for number, x in enumerate(hidden):
            yield cache.around(number, x, lambda x=x: block(x))

    cache.probe_residual_adds(hidden[0], lambda x: lambda: block(x))
    for cache.stage in range(4):
        cache.fold_into_hidden(hidden)
        assert all(map(torch.equal, [call() for call in calls()], expected))


def zeroed(model):
    """Zero the attention output of the first block."""
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.o_proj.weight").zero_()
    return model


@pytest.mark.parametrize("model_type", ["gemma3_text", "llama"])
def test_attention_that_gives_nothing_tells_nothing_of_other_blocks(model_type, monkeypatch):
    ids = torch.randint(3, 60, (10, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for fold in (ActivationCache.fold_into_hidden, lambda *_: None):
        monkeypatch.setattr(ActivationCache, "fold_into_hidden", fold)
        model = zeroed(tiny(model_type))
        prunekit.prune(model, ids, sparsity=0.5, iterations=3)
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_part_that_is_called_twice_is_run_again():
    block = Block(lambda x: x).eval()
    cache = ActivationCache(block, STAGES)
    cache.stage = 2
    x = torch.randn(3, 5, 4)
    with torch.no_grad():
        expected = block.part(x), block.part(block.part(x))
        for _ in range(2):
            first, second = cache.around(0, x, lambda: (block.part(x), block.part(block.part(x))))()
            assert torch.equal(first, expected[0])
            assert torch.equal(second, expected[1])


def test_an_error_leaves_nothing_behind():
    block = Block(lambda x: x).eval()
    cache = ActivationCache(block, STAGES)
    x = torch.randn(3, 5, 4)
    cache.stage = 2
    with torch.no_grad():
        cache.around(0, x, lambda: block(x))()

        def fails():
            block(x)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            cache.around(0, x, fails)()
    assert "forward" not in vars(block.part)
    assert not any(module._forward_hooks for module in block.modules())
    assert not any(module._forward_pre_hooks for module in block.modules())
