"""Batches of samples of unlike lengths: with masks, or without padding."""

import torch

from prunekit.data.samples import IGNORED, Samples
from prunekit.distributed.ranks import Ranks

LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def samples(seed=0):
    rows = [
        {"input_ids": [10 * at + k for k in range(1, n + 1)], "labels": at % 2}
        for at, n in enumerate(LENGTHS)
    ]
    return Samples(rows, 7, "rows", seed)


def ids(batch):
    masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return [row[mask].tolist() for row, mask in zip(batch["input_ids"], masks, strict=True)]


def test_padding_is_masked_and_similar_lengths_share_a_batch():
    batches = samples().batches(12)
    every = [row for batch in batches for row in ids(batch)]
    assert sorted(every) == sorted(list(row["input_ids"]) for row in samples().rows)
    for batch in batches:
        assert batch["input_ids"].numel() <= 12
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 7).all()
        assert [row[0] // 10 % 2 for row in ids(batch)] == batch["labels"].tolist()
    padding = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)
    assert padding == 7  # 24 where batches are filled in the given order


def test_even_batches_have_no_padding_and_no_mask():
    batches = samples().even_batches(12)
    assert all(batch.keys() == {"input_ids", "labels"} for batch in batches)
    assert sorted(row for batch in batches for row in ids(batch)) == sorted(
        list(row["input_ids"]) for row in samples().rows
    )
    assert all(batch["input_ids"].numel() <= 12 for batch in batches)


def test_targets_are_filled_with_labels_that_are_ignored():
    rows = [{"input_ids": [1, 2], "labels": [3]}, {"input_ids": [4, 5], "labels": [6, 7]}]
    (batch,) = Samples(rows, 9, "").batches(99)
    assert batch["labels"].tolist() == [[3, IGNORED], [6, 7]]
    assert len(Samples(rows, 9, "").even_batches(99)) == 2


def test_the_order_is_that_of_the_seed():
    orders = [[ids(batch) for batch in samples(seed).batches(12)] for seed in (0, 0, 1, None)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert [len(rows[0]) for rows in orders[3]] == sorted(len(rows[0]) for rows in orders[3])


def test_ranks_share_the_samples_of_one_process_in_its_order():
    for made in ("batches", "even_batches"):
        one = [row for batch in getattr(samples(), made)(12) for row in ids(batch)]
        shared = []
        for rank in range(5):
            share = Ranks(rank, 5).shard(len(LENGTHS))
            own = [row for batch in getattr(samples(), made)(12, share) for row in ids(batch)]
            assert len(own) == share.stop - share.start
            shared += own
        assert shared == one


def test_batches_of_a_number_of_samples():
    assert sorted(len(batch["labels"]) for batch in samples().batches_of(5)) == [2, 5, 5]
    assert len(samples().part(slice(-3, None))) == 3
    assert samples().longest == 9
    assert samples().tokens == sum(LENGTHS)


def test_the_digest_is_that_of_the_content():
    assert samples().digest == samples(5).digest
    assert samples().digest != samples().part(slice(11)).digest
