"""Many tensors in few collectives, and checksums that see a single bit."""

import torch

from prunekit.distributed import weights
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.distributed.weights import checksum, differing, sum_over_ranks


class Doubling(Ranks):
    """Two ranks with the same tensors; keeps the sizes of the collectives."""

    def __init__(self):
        super().__init__(0, 2)
        self.sizes = []

    def all_reduce_sum(self, tensor, purpose):
        assert tensor.is_contiguous()
        tensor *= 2
        self.sizes.append(tensor.numel())


def test_small_tensors_of_a_kind_are_one_collective_and_large_ones_are_not_copied(monkeypatch):
    monkeypatch.setattr(weights, "BUCKET_BYTES", 4 * 100)
    shapes = [(3, 5), (), (2, 2), (20, 30), (9, 10), (4,)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors += [torch.randn(6, 4).T, torch.randn(7, dtype=torch.float64), torch.randn(30, 20).T]
    expected = [each.clone() * 2 for each in tensors]
    ranks = Doubling()
    sum_over_ranks(tensors, ranks, "gradients")
    for each, truth in zip(tensors, expected, strict=True):
        assert torch.equal(each, truth)
    assert ranks.sizes == [20, 600, 94, 24, 600, 7]


def test_one_process_sums_and_compares_nothing():
    value = torch.ones(3)
    sum_over_ranks([value], SINGLE, "gradients")
    assert value.tolist() == [1, 1, 1]
    assert differing({"value": value}, SINGLE) == []


def test_a_checksum_sees_bits_and_their_places(monkeypatch):
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool):
        value = (torch.arange(48) % 2).to(dtype).view(6, 8)
        assert checksum(value) == checksum(value.clone()) != checksum(value.flip(1))
        # Two changes of a bit that a plain sum would not see.
        swapped = value.clone()
        swapped[0, :2] = value[0, :2].flip(0)
        assert checksum(swapped) != checksum(value)
    near = torch.full((5,), 1.0)
    assert checksum(near) != checksum(near.nextafter(torch.tensor(2.0)))
    assert checksum(torch.zeros(1)) != checksum(-torch.zeros(1))
    assert checksum(torch.tensor(2.0)) == checksum(torch.tensor([2.0]))
    value = torch.randn(50)
    monkeypatch.setattr(weights, "PART", 16)
    parts = [checksum(value)]
    value[:16], value[16:32] = value[16:32].clone(), value[:16].clone()
    assert checksum(value) not in parts
