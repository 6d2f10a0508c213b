"""Planned memory of teacher, transformations and distances."""

from types import SimpleNamespace

import pytest

import prunekit
from prunekit.errors import CapacityError
from prunekit.runs.training_memory import (
    DISTILLED_LOGITS,
    DISTILLED_STATES,
    distillation_memory,
    saved_state_disk,
    saved_state_words,
    training_state_bytes,
)
from tests.support import checkpoints
from tests.support.trained import TRAIN, planned

GRADUAL = {"sparsity": 0.75, "end": 6, "every": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama"))


def test_a_dense_teacher_is_a_second_model(llama, tmp_path):
    """Beside it are transformations with moments, and distances of a batch."""
    plan = planned(llama, tmp_path / "out", GRADUAL, distill={"rank": 3})
    width, vocabulary = plan.model.config.hidden_size, plan.model.config.vocab_size
    transformations = 4 * 4 * 2 * 3 * width
    distances = TRAIN["batch"] * 12 * (DISTILLED_LOGITS * vocabulary + DISTILLED_STATES * 4 * width)
    assert plan.memory["distillation"] == 4 * (plan.parameters + transformations + distances)
    without = planned(llama, tmp_path / "out", GRADUAL)
    assert "distillation" not in without.memory
    assert plan.memory["training"] == without.memory["training"] == training_state_bytes(plan)


def test_a_teacher_that_shares_frozen_weights_has_copies_of_the_adapter(llama, tmp_path):
    pytest.importorskip("peft")
    train = {"adapter": {"rank": 2, "targets": ["q_proj"]}}
    plan = planned(llama, tmp_path / "out", GRADUAL, train=train, distill={"rank": 3})
    dense, shared = (distillation_memory(plan, gated=gated) for gated in (False, True))
    width = plan.model.config.hidden_size
    assert dense["distillation"] - shared["distillation"] == 4 * (
        plan.parameters - 2 * (2 * (width + width))
    )


def test_saved_states_need_value_best_value_and_moments_of_all_that_is_trained(llama, tmp_path):
    """Two states are on disk while one is written, but then no weights of the result."""
    plan = planned(llama, tmp_path / "out", {"sparsity": 0.5})
    state = 16 * plan.parameters
    assert saved_state_disk(plan) == 2 * state - plan.checkpoint.nbytes
    assert "more while it trains" in saved_state_words(plan)
    gradual = planned(llama, tmp_path / "out", GRADUAL)
    more = saved_state_disk(gradual) - saved_state_disk(plan)
    assert more == 2 * (gradual.prunable // 8)
    never = planned(llama, tmp_path / "out", GRADUAL, train={"save_every": 0})
    assert saved_state_disk(never) == 0
    assert saved_state_words(never) == ""


def test_the_plan_counts_saved_states_on_the_disk(llama, tmp_path, monkeypatch):
    plan = planned(llama, tmp_path / "out", GRADUAL)
    needed = plan.checkpoint.nbytes + saved_state_disk(plan)
    for free in (needed, needed - 1):
        usage = SimpleNamespace(total=free, free=free)
        monkeypatch.setattr("prunekit.runs.checks.shutil.disk_usage", lambda _, found=usage: found)
        if free == needed:
            planned(llama, tmp_path / "out", GRADUAL)
            continue
        with pytest.raises(CapacityError, match=r"state of the training .* save_every = 0"):
            planned(llama, tmp_path / "out", GRADUAL)


def test_a_saved_state_has_the_planned_size(llama, tmp_path):
    plan = planned(llama, tmp_path / "out", GRADUAL, train={"save_every": 5, "every": 4})
    for record in prunekit.run(plan):
        if record.values.get("done") == 8:
            break
    (file,) = (tmp_path / "out").glob("training-state-*")
    size = saved_state_disk(plan) + plan.checkpoint.nbytes
    assert 0.35 * size < file.stat().st_size < 0.6 * size
