"""Planned memory of teacher, transformations and distances."""

import pytest

from prunekit.runs.training_memory import (
    DISTILLED_LOGITS,
    DISTILLED_STATES,
    distillation_memory,
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
