"""When a plan shards a training, and the memory that it states."""

from dataclasses import replace

import pytest

from prunekit.config.run_config import Config, StructuredConfig
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import CapacityError, ConfigError
from prunekit.runs import jobs
from prunekit.runs.preflight import Preflight
from prunekit.runs.sharded_training import held_words, ways_out
from prunekit.runs.training_memory import training_activations, training_state_bytes
from tests.support import checkpoints

WEIGHTS = {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.5}
UNITS = {"method": "gradient", "pattern": ["neurons"], "sparsity": 0.5, "end": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def planned(llama, tmp_path):
    """Return the plan of a training of some ranks."""

    def of(ranks=SINGLE, prune=None, memory=None, samples=12, **train):
        values = {
            "model": {"path": str(llama), "device": "cpu"},
            "calibration": {"data": str(llama / "text.txt"), "samples": samples, "length": 12},
            "prune": prune or WEIGHTS,
            "train": {"steps": 4, "held_out": 2} | train,
            "output": {"path": str(tmp_path / "out")},
        }
        kind = StructuredConfig if prune in (UNITS, BY_WEIGHTS) else Config
        preflight = Preflight(memory) if memory else None
        return jobs.plan(kind.model_validate(values), ranks, preflight)

    return of


BY_WEIGHTS = UNITS | {"method": "llm-pruner"}


def test_each_of_four_processes_has_a_quarter_of_values_gradients_and_moments(planned):
    made = planned(Ranks(0, 4), sharded=True)
    assert made.sharded
    assert made.training.sharded
    block = sum(each.numel() for each in made.stacks[0].blocks[0].parameters())
    outside = made.parameters - len(made.stacks[0].blocks) * block
    share = -(-5 * made.parameters // 4)
    assert training_state_bytes(made) == 4 * (share + 4 * block + 3 * outside)
    assert training_state_bytes(replace(made, sharded=False)) == 20 * made.parameters
    assert "a part of the weights, gradients" in held_words(made)
    gradual = planned(Ranks(0, 4), WEIGHTS | {"end": 2}, sharded=True)
    assert training_state_bytes(gradual) == 4 * (share + made.parameters)


def test_a_training_that_fits_in_no_other_way_is_sharded(planned):
    whole = planned(Ranks(0, 4), sharded=False)
    parts = planned(Ranks(0, 4), sharded=True)
    between = (sum(whole.memory.values()) + sum(parts.memory.values())) // 2
    assert planned(Ranks(0, 4), memory=between).sharded
    assert not planned(Ranks(0, 4), memory=2 * between).sharded
    little = sum(parts.memory.values()) // 8
    with pytest.raises(CapacityError, match=r"holds the whole model .*train\.adapter"):
        planned(Ranks(0, 4), memory=little, sharded=False)
    with pytest.raises(CapacityError, match="start several processes"):
        planned(memory=little)


def test_adapters_are_trained_where_all_weights_do_not_fit(planned, monkeypatch):
    pytest.importorskip("peft")
    whole, small = planned(), planned(adapter={})
    between = (sum(whole.memory.values()) + sum(small.memory.values())) // 2
    made = planned(memory=between)
    assert made.config.train.adapter == small.config.train.adapter
    assert made.memory == small.memory
    assert any("adapters of rank 8 are trained instead" in note for note in made.notes)
    assert planned(memory=2 * sum(whole.memory.values())).config.train.adapter is None
    with pytest.raises(CapacityError):
        planned(memory=between, only=["norms"], batch=12)
    monkeypatch.setattr("prunekit.runs.sharded_training.find_spec", lambda name: None)
    with pytest.raises(CapacityError, match=r"train\.adapter"):
        planned(memory=between)


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        (SINGLE, {}, "one process has all weights"),
        (Ranks(0, 2), {"prune": UNITS, "samples": 11}, r"divided evenly.*samples = 10"),
        (Ranks(0, 2), {"prune": BY_WEIGHTS}, "llm-pruner ranks by gradients of whole weights"),
    ],
)
def test_sharding_that_is_asked_for_and_impossible_is_refused(planned, ranks, options, message):
    with pytest.raises(ConfigError, match=rf"^train\.sharded: .*{message}"):
        planned(ranks, sharded=True, **options)


def test_checkpointed_activations_are_the_inputs_of_blocks_and_those_of_one(planned):
    made, less = planned(), planned(checkpoint_activations=True)
    assert training_activations(less) < training_activations(made)
    assert "checkpoint_activations" in " ".join(ways_out(made))
    assert "checkpoint_activations" not in " ".join(ways_out(less))
