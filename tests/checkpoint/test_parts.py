"""Parts of tensors, found by their names."""

import pytest
import torch

from prunekit.checkpoint.parts import (
    TensorPart,
    find_part,
    is_whole,
    joined_name,
    joined_shape,
    put_parts,
    whole_tensors,
)

WHOLE = torch.arange(2 * 4 * 6).view(2, 4, 6)
PARTS = {
    TensorPart("a.b", 1, range(2, 4)): WHOLE[1, 2:4],
    TensorPart("a.b", 0, range(1, 4, 2)): WHOLE[0, 1::2],
    TensorPart("a.b", 1, range(3), transposed=True): WHOLE[1].T[:3],
    TensorPart("a.b", 1, range(1, 6, 2), transposed=True): WHOLE[1].T[1::2],
}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_a_part_is_found_by_its_name(part):
    assert TensorPart.parse(part.name) == part
    assert torch.equal(part.of(WHOLE), PARTS[part])
    assert part.shape(tuple(WHOLE.shape)) == tuple(PARTS[part].shape)


def test_a_tensor_is_no_part():
    assert TensorPart.parse("model.layers.0.weight") is None


def test_rows_of_biases_are_parts_too():
    part = TensorPart("bias", 1, range(0, 4, 2))
    assert torch.equal(part.of(WHOLE[..., 0]), WHOLE[1, ::2, 0])
    assert part.shape((2, 4)) == (2,)


def test_a_tensor_without_the_part_has_no_shape_for_it():
    part = TensorPart("a", 2, range(4))
    assert part.shape((2, 4, 6)) is None
    assert part.shape((3, 3, 6)) is None
    assert part.shape((8,)) is None


def test_whole_tensors_are_named_once_in_order():
    names = [part.name for part in PARTS]
    assert whole_tensors(["x", *names, "y"]) == ["x", "a.b", "y"]


def test_changed_parts_are_put_into_a_copy():
    changed = {part.name: torch.zeros_like(rows) for part, rows in [*PARTS.items()][:3]}
    before = WHOLE.clone()
    found = put_parts({"a.b": WHOLE, "x": WHOLE}, changed | {"x": WHOLE[0]})
    assert torch.equal(WHOLE, before)
    assert torch.equal(found["x"], WHOLE[0])
    expected = before.clone()
    expected[1, 2:4] = expected[0, 1::2] = 0
    expected[1, :, :3] = 0
    assert torch.equal(found["a.b"], expected)


def test_matrices_below_each_other_are_numbered_of_their_count():
    stacked = WHOLE.flatten(0, 1)
    part = TensorPart("a.b", 1, range(0, 4, 2), count=2)
    assert TensorPart.parse(part.name) == part
    assert torch.equal(part.of(stacked), WHOLE[1, ::2])
    assert part.shape((8, 6)) == (2, 6)
    assert part.shape((9, 6)) is None
    assert TensorPart("bias", 2, range(2), count=4).shape((8,)) == (2,)
    turned = TensorPart("a.b", 1, range(6), transposed=True, count=2)
    assert torch.equal(turned.of(stacked), WHOLE[1].T)
    assert turned.shape((8, 6)) == (6, 4)


def test_tensors_below_each_other_are_one():
    one, other = WHOLE[0], WHOLE[1, :2]
    name = joined_name(["x.a", "x.b"])
    assert not is_whole(name)
    assert whole_tensors([name, "x.b"]) == ["x.a", "x.b"]
    tensors = {"x.a": one, "x.b": other}
    found = find_part(tensors, name)
    assert torch.equal(found, torch.cat([one, other]))
    assert find_part({"x.a": one}, name) is None
    assert joined_shape([(4, 6), (2, 6)]) == (6, 6)
    assert joined_shape([(4, 6), (2, 5)]) is None
    changed = put_parts(tensors, {name: found * 2})
    assert torch.equal(changed["x.a"], one * 2)
    assert torch.equal(changed["x.b"], other * 2)
    assert torch.equal(tensors["x.a"], WHOLE[0])
