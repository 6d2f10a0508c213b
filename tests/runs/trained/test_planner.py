"""Trainings of weights that are refused before any weight is read, and their memory."""

import pytest
from rich.console import Console

from prunekit.errors import CapacityError, ConfigError
from prunekit.runs.preflight import Preflight
from prunekit.runs.trained import planner
from tests.support import checkpoints
from tests.support.trained import planned

GRADUAL = {"sparsity": 0.75, "end": 6, "every": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama"))


def shown(plan):
    console = Console(width=400)
    with console.capture() as capture:
        console.print(plan.describe())
    return " ".join(capture.get().split())


def test_the_plan_says_when_it_prunes_and_what_it_holds(llama, tmp_path):
    text = shown(planned(llama, tmp_path / "out", GRADUAL))
    assert "allocation uniform, 3 times while training, from step 2 to 6, cubic" in text
    assert "8 steps of 4 samples at most, held out 4 samples; saved with" in text
    assert "in float32, with the whole model in memory" in text
    assert "masks 2.3 kB" in text
    once = shown(planned(llama, tmp_path / "out", {"sparsity": 0.5}))
    assert "once, before the training" in once
    later = shown(planned(llama, tmp_path / "out", {"pattern": "2:4", "end": 5}))
    assert "once, at step 5 of the training" in later
    back = shown(planned(llama, tmp_path / "out", GRADUAL | {"regrow": 0.25, "regrow_every": 3}))
    assert "0.25 of it returns every 3 steps" in back


def test_memory_is_that_of_weights_gradients_moments_the_best_and_masks(llama, tmp_path):
    plan = planned(llama, tmp_path / "out", GRADUAL)
    assert plan.memory["training"] == 5 * 4 * plan.parameters
    assert plan.memory["masks"] == plan.prunable // 8
    assert plan.memory["hidden states"] == 0
    batch = planned(llama, tmp_path / "out", GRADUAL, train={"batch": 8}).memory
    assert batch["activations"] == 2 * plan.memory["activations"]
    wanda = planned(llama, tmp_path / "out", GRADUAL | {"method": "wanda"}).memory
    assert wanda["hidden states"] > 0
    pytest.importorskip("peft")
    adapter = planned(llama, tmp_path / "out", GRADUAL, train={"adapter": {"rank": 1}})
    linears = 2 * (4 * 64 - 2 * 16 + 3 * 96)
    assert adapter.memory["training"] == 4 * (plan.parameters + 5 * linears)


def test_a_training_that_does_not_fit_is_refused(llama, tmp_path):
    plan = planned(llama, tmp_path / "out", GRADUAL)
    with pytest.raises(CapacityError, match=r"\[train\] holds the whole model in memory"):
        planner.plan(plan.config, preflight=Preflight(device_memory=1000))


@pytest.mark.parametrize(
    ("model_type", "prune", "train", "message"),
    [
        ("bert", GRADUAL, {}, "train: it asks how well the model predicts"),
        ("llama", GRADUAL | {"method": "sparsegpt", "order": "energy"}, {}, "order: "),
        ("llama", GRADUAL, {"adapter": {"targets": ["c_attn"]}}, "'c_attn' is no linear of Llama"),
        ("llama", GRADUAL, {"log_with": ["taste"]}, '"taste" is not a tracker of accelerate'),
        (
            "llama",
            {"sparsity": 0.5, "propagation": "none", "recover": "block"},
            {},
            'propagation = "none" does not go with recover',
        ),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, model_type, prune, train, message):
    if train:
        pytest.importorskip("peft")
    folder = checkpoints.write(tmp_path / "model", model_type)
    with pytest.raises(ConfigError, match=message):
        planned(folder, tmp_path / "out", prune, train=train)
