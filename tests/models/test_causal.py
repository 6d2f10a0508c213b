"""Which models predict each token from those before it."""

import pytest
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from prunekit.models.causal import predicts_next_token
from tests.support.architectures import tiny


@pytest.mark.parametrize(
    ("model_type", "head", "expected"),
    [
        ("llama", (), True),
        ("gpt2", (), True),
        ("llava", (AutoModelForImageTextToText,), True),
        ("bert", (), False),
        ("bert", (AutoModelForSequenceClassification,), False),
        ("t5", (AutoModelForSeq2SeqLM,), False),
    ],
)
def test_causal_models_are_those_for_text_and_for_images_with_text(model_type, head, expected):
    model = tiny(model_type, *head)
    assert predicts_next_token(type(model), model.config) is expected
