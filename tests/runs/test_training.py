"""Training within a run: text that is held out, adapters, and rows of the report."""

from types import SimpleNamespace

import pytest
import torch

from prunekit.config.prune_table import Prune
from prunekit.config.train_table import Adapter, Train
from prunekit.data.tokens import Tokens
from prunekit.errors import ConfigError
from prunekit.runs.training import (
    adapted_linears,
    schedule_words,
    training_facts,
    training_texts,
    training_words,
    why_no_loss,
)
from prunekit.runs.training_log import Row
from prunekit.training.recover import TrainingStep
from tests.support.architectures import tiny


def planned(train):
    return SimpleNamespace(config=SimpleNamespace(training=train), device=torch.device("cpu"))


def test_the_last_samples_are_held_out():
    tokens = Tokens.of(torch.arange(20).view(10, 2), "")
    texts = training_texts(planned(Train(batch=3, held_out=2)), tokens)
    assert texts is not None
    trained, held_out = texts
    assert [batch["input_ids"].tolist() for batch in held_out] == [[[16, 17], [18, 19]]]
    assert [len(batch["input_ids"]) for batch in trained] == [3, 3, 2]
    assert training_texts(planned(None), tokens) is None
    with pytest.raises(ConfigError, match=r"text for 10 samples, of which held_out = 10"):
        training_texts(planned(Train(held_out=10)), tokens)


def test_only_causal_language_models_have_a_loss_of_text():
    text, rows = (SimpleNamespace(calibration=SimpleNamespace(task=task)) for task in (None, "x"))
    assert why_no_loss(text, tiny("llama")) is None
    assert "BertForMaskedLM" in (why_no_loss(text, tiny("bert")) or "")
    assert why_no_loss(rows, tiny("bert")) is None


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.parametrize(
    ("targets", "count"), [(["all-linear"], 14), (["q_proj"], 2), (["query", "down"], 4)]
)
def test_adapted_linears_are_those_of_peft(targets, count):
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    found = adapted_linears(model, Adapter(targets=targets))
    assert len(found) == count
    if targets != ["query", "down"]:
        names = targets[0] if targets == ["all-linear"] else targets
        made = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, r=1))
        adapted = [each for each in made.modules() if hasattr(each, "lora_A")]
        assert {each.base_layer for each in adapted} == {*found}


def test_facts_have_what_was_measured():
    steps = [
        TrainingStep(0, None, 2.0, {}, None, 0.0, 0.0, done=False),
        TrainingStep(10, 1.5, None, {}, 1e-3, 0.4, 0.4, done=False),
        TrainingStep(20, 1.4, 2.5, {}, 1e-4, 0.7, 0.7),
    ]
    rows = [Row(step, {"heads": 1 - step.sparsity}) for step in steps]
    facts = training_facts(1.9, rows, gradual=True)
    assert (facts["post"], facts["recovery"], facts["final"]) == (None, None, 2.5)
    assert facts["history"][1] == {
        "step": 10, "loss": 1.5, "held_out": None, "rate": 1e-3,
        "sparsity": 0.4, "achieved": 0.4, "factors": {"heads": 0.6},
    }  # fmt: skip
    plain = [TrainingStep(0, None, 2.0, {}), TrainingStep(10, 1.5, 1.95, {}, 1e-3)]
    facts = training_facts(1.9, [Row(step, {}) for step in plain], gradual=False)
    assert (facts["post"], facts["final"]) == (2.0, 1.95)
    assert facts["recovery"] == pytest.approx(0.5)
    assert facts["history"][1].keys() == {"step", "loss", "held_out", "rate"}


def test_a_training_is_told_in_words():
    assert training_words(Train(steps=7), Adapter(rank=2)) == (
        "7 steps of 4 samples at most, held out 16 samples, adapters of rank 2 on all-linear; "
        "saved with validations, for --resume"
    )
    assert training_words(Train(save_every=9), None).endswith("; saved every 9 steps, for --resume")
    never = training_words(Train(save_every=0), None)
    assert never.endswith("; a training that is stopped begins again")
    prune = {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.5}
    once = Prune.model_validate(prune | {"end": 9, "schedule": "one-shot"})
    assert schedule_words(once) == "once, at step 9 of the training"
