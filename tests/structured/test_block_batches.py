"""Padded batches become batches without padding, with the same tokens."""

import pytest
import torch

from prunekit.data.samples import IGNORED
from prunekit.errors import ConfigError
from prunekit.structured.block_batches import block_batches
from tests.support.architectures import tiny
from tests.support.labelled import classifier

IDS = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0], [0, 3, 4, 2]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1]])


@pytest.fixture(scope="module")
def bert():
    return classifier()


def test_padding_at_either_end_is_left_out(bert):
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1, 1])}
    found = block_batches([batch], bert)
    assert [each["input_ids"].tolist() for each in found] == [[[8, 9]], [[5, 6, 7], [3, 4, 2]]]
    assert all("attention_mask" not in each for each in found)


def test_token_types_are_those_of_their_tokens(bert):
    types = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    batch = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": types}
    found = block_batches([batch], bert)
    assert [each["token_type_ids"].tolist() for each in found] == [[[0, 1]], [[0, 1, 1], [0, 0, 1]]]


def test_a_decoder_has_the_labels_that_are_not_ignored():
    labels = torch.tensor([[1, 2, IGNORED], [3, IGNORED, IGNORED], [4, 5, 6]])
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    found = block_batches([batch], tiny("t5"))
    assert [each["labels"].tolist() for each in found] == [[[3]], [[1, 2]], [[4, 5, 6]]]


def test_token_ids_are_split_as_they_are(bert):
    (batch,) = block_batches(IDS, bert)
    assert torch.equal(batch["input_ids"], IDS)


def test_batches_that_were_made_are_made_again_alike(bert, monkeypatch):
    monkeypatch.setattr("prunekit.structured.block_batches.batch_tokens", lambda _: 4)
    rows = torch.arange(1, 13).view(6, 2)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1], [1, 0], [1, 1]])
    once = block_batches([{"input_ids": rows, "attention_mask": mask}], bert)
    again = block_batches(once, bert)
    assert len(once) > 2
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1, 0]] * 3)}, "has gaps in sample 0 of a batch"),
        ({"attention_mask": MASK * torch.tensor([[1], [1], [0]])}, "masks all of sample 2 of"),
        ({"position_ids": IDS}, "blocks are run on attention_mask"),
    ],
)
def test_batches_that_blocks_cannot_be_run_on_are_refused(bert, extra, message):
    with pytest.raises(ConfigError, match=message):
        block_batches([{"input_ids": IDS, **extra}], bert)
