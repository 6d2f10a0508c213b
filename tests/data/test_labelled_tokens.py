"""Labelled rows become the tokens of stock transformers; what is cut off is counted."""

import pytest
from transformers import AutoModelForSequenceClassification

from prunekit.data.labelled import LabelledTask
from prunekit.data.labelled_tokens import LabelledData
from prunekit.errors import ConfigError
from tests.support.architectures import tiny
from tests.support.checkpoints import tokenizer
from tests.support.labelled import (
    SENTENCES,
    WORDS,
    classifier,
    labelled,
    sentences,
    words,
    write_rows,
)

CLASSIFIER = AutoModelForSequenceClassification


@pytest.fixture(scope="module")
def bert():
    return classifier()


def test_rows_are_tokenized_as_by_stock(bert, tmp_path):
    found = labelled(bert, sentences(tmp_path), "classification").first()
    expected = tokenizer()([text for text, _ in SENTENCES])["input_ids"]
    assert [row["input_ids"] for row in found.rows] == expected
    assert [row["labels"] for row in found.rows] == [label for _, label in SENTENCES]
    assert found.description == f"8 rows of {tmp_path.name}/sentences.tsv"


def test_targets_are_tokens_and_only_kinds_that_the_model_has_are_passed(tmp_path):
    found = labelled(tiny("t5"), words(tmp_path), "seq2seq").first(3)
    targets = tokenizer()([target for _, target in WORDS[:3]])["input_ids"]
    assert [row["labels"] for row in found.rows] == targets
    assert found.rows[0].keys() == {"input_ids", "labels"}
    assert found.description == f"the first 3 of 5 rows of {tmp_path.name}/words.tsv"


def test_a_pair_has_token_types_where_the_model_has_some(bert, tmp_path):
    file = write_rows(tmp_path / "a.tsv", ("text", "pair", "label"), ("ab", "c", 1))
    made = tokenizer()
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    ids = made("ab", "c")["input_ids"]
    for model, types in ((bert, {"token_type_ids": [0, 0, 1]}), (tiny("gpt2", CLASSIFIER), {})):
        task = LabelledTask.of("classification", None, model)
        (row,) = LabelledData(task, made, [str(file)], 64).first().rows
        assert row == {"input_ids": ids, "labels": 1, **types}


def test_longer_texts_are_cut_off_and_counted(bert, tmp_path):
    found = labelled(bert, sentences(tmp_path), "classification", length=12).first()
    assert found.longest == 12
    assert found.description.endswith(", 3 longer texts are cut off at 12 tokens")
    capped = tokenizer()
    capped.model_max_length = 30
    task = LabelledTask.of("classification", None, bert)
    found = LabelledData(task, capped, [str(sentences(tmp_path))], 64).first()
    assert found.description.endswith(", 1 longer text is cut off at 30 tokens")


def test_rows_are_chosen_by_the_seed(bert, tmp_path):
    data = labelled(bert, sentences(tmp_path), "classification")
    chosen = [data.sample(4, seed) for seed in (0, 0, 1)]
    assert chosen[0].digest == chosen[1].digest != chosen[2].digest
    assert chosen[0].description == f"4 of 8 rows of {tmp_path.name}/sentences.tsv, seed 0"
    assert len(data.sample(99, 0)) == 8


def test_a_token_that_the_model_lacks_is_refused_with_its_row(tmp_path):
    small = classifier(vocab_size=30)
    with pytest.raises(ConfigError, match=r"sentences.tsv:2: .* but the model knows 0 to 29"):
        labelled(small, sentences(tmp_path), "classification").first()


def test_a_length_without_room_for_text_is_refused(bert, tmp_path):
    made = tokenizer()
    made.num_special_tokens_to_add = lambda pair: 3
    task = LabelledTask.of("classification", None, bert)
    with pytest.raises(ConfigError, match="3 tokens of a sample hold the 3 special ones"):
        LabelledData(task, made, [str(sentences(tmp_path))], 3).first()
