"""A config that gives a block another kind in its new place is refused with the difference."""

import pytest
import torch
from torch import nn

from prunekit.errors import ShapeError
from prunekit.models.units.block_kinds import adopt_numbers, check_same_blocks, check_same_rest


class Block(nn.Module):
    def __init__(self, number, *, width=4, kind="full", rotates=True, decay=1.0):
        super().__init__()
        self.mixer = nn.Linear(2, width, bias=False)
        self.layer_id, self.kind, self.rotates, self.window = number, kind, rotates, None
        self.register_buffer("decay", torch.full((2,), decay), persistent=False)


def blocks(*options):
    return nn.ModuleList(Block(number, **each) for number, each in enumerate(options))


def test_equal_kinds_pass_and_a_number_moves_with_its_block():
    whole, fewer = blocks({"width": 3}, {}, {"kind": "conv"}), blocks({}, {"kind": "conv"})
    check_same_blocks("layers", whole, fewer, [1, 2], set())
    adopt_numbers(whole[2], whole[2], fewer[1])
    assert whole[2].layer_id == 1


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"width": 5}, r"layers\.1\.mixer\.weight: has shape \[4, 2\].*wants \[5, 2\]"),
        ({"kind": "conv"}, "kind is full, and a stock model with fewer blocks gives.*conv"),
        ({"rotates": False}, "rotates is True"),
        ({"decay": 0.5}, "decay follows from the place"),
    ],
)
def test_another_kind_is_refused(changed, match):
    with pytest.raises(ShapeError, match=match):
        check_same_blocks("layers", blocks({}, {}), blocks(changed), [1], set())


def test_other_parameters_and_counts_are_refused():
    whole, fewer = blocks({}, {}), blocks({})
    fewer[0].gate = nn.Linear(2, 2)
    with pytest.raises(ShapeError, match=r"layers\.1\.gate\.bias: not every block has it"):
        check_same_blocks("layers", whole, fewer, [1], set())
    with pytest.raises(ShapeError, match="makes 2 blocks of it, not 1"):
        check_same_blocks("layers", whole, whole, [1], set())


def test_parameters_outside_of_the_blocks_have_to_stay():
    def model(width):
        return nn.ModuleDict({"layers": blocks({}), "embed": nn.Embedding(3, width)})

    check_same_rest(model(4), model(4), ["layers"])
    with pytest.raises(
        ShapeError, match=r"embed.weight: is \[3, 4\] with all blocks, and \[3, 2\]"
    ):
        check_same_rest(model(4), model(2), ["layers"])
