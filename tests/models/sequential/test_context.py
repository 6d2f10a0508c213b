"""Further inputs of blocks are each batch's own."""

import torch

from prunekit.models.sequential.context import Context


def test_a_dictionary_that_blocks_fill_is_the_batch_s_own_and_others_are_passed_on():
    context, masks, empty = Context({"input_ids": torch.zeros(1)}), {"full": 1}, {}
    assert context.share("masks", masks) is masks
    shared = context.share("keys", empty)
    assert shared == {}
    assert shared is not empty
    assert context.share("keys", {}) is shared
    assert Context().share("keys", {}) is not shared


def test_what_a_block_hands_on_is_kept_until_the_next_one_has_run():
    context = Context()
    context.hand_on(0, (1,))
    context.hand_on(1, (2,))
    context.hand_on(1, (3,))  # a block runs more than once
    assert context.tails == {0: (1,), 1: (3,)}
    context.hand_on(2, None)
    assert context.tails == {1: (3,), 2: None}
