"""The class of transformers that opens a model."""

import pytest
import transformers

from prunekit.models.auto_class import KNOWN, auto_class
from tests.support import checkpoints


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5", "bert"])
def test_a_model_is_opened_by_its_class_as_what_it_is(model_type, tmp_path):
    folder = checkpoints.write(tmp_path / model_type, model_type)
    config = transformers.AutoConfig.from_pretrained(folder)
    (architecture,) = config.architectures
    found = auto_class(config.model_type, architecture)
    model = getattr(transformers, found.name).from_pretrained(folder)
    assert type(model).__name__ == architecture


def test_tasks_are_those_that_hub_and_peft_know():
    peft = pytest.importorskip("peft")
    assert {each.peft for each in KNOWN.values() if each.peft} <= {*peft.TaskType.__members__}
    assert auto_class("llama", "LlamaForCausalLM").task == "text-generation"
    assert auto_class("llama", "LlamaForSequenceClassification").peft == "SEQ_CLS"
    assert auto_class("llama", "LlamaModel").name == "AutoModel"
    assert auto_class("no such type", "X").task == "feature-extraction"
