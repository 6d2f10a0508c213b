"""Draws of layers, divergences and distances, against formulas in float64."""

import pytest
import torch

from prunekit.training.distill_losses import (
    QUARTERS,
    Transformations,
    divergence,
    drawn_blocks,
    squared_distance,
)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6, 13])
def test_a_block_is_drawn_from_each_quarter_that_has_any(depth):
    """Each block of a quarter is drawn at some step."""
    drawn = [drawn_blocks(depth, 0, step) for step in range(100)]
    assert {tuple(each) for each in drawn} == {tuple(drawn[0])}
    assert len(drawn[0]) == min(depth, QUARTERS)
    for each in drawn:
        for quarter, block in each.items():
            assert quarter * depth // 4 <= block < (quarter + 1) * depth // 4
    assert {block for each in drawn for block in each.values()} == {*range(depth)}


def test_draws_depend_on_seed_and_step_alone():
    assert drawn_blocks(48, 5, 7) == drawn_blocks(48, 5, 7)
    assert len({tuple(drawn_blocks(48, seed, 7).values()) for seed in range(9)}) > 1


def test_divergence_is_the_sum_over_predictions_times_the_square_of_the_temperature():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 3, 7, generator=generator) for _ in range(2))
    labels = torch.tensor([[1, -100, 2], [-100, 3, 0]])
    expected = 0.0
    for sample, place in [(0, 0), (0, 2), (1, 1), (1, 2)]:
        weights = [(z[sample, place].double() / 1.5).exp() for z in (teacher, student)]
        truth, ours = (each / each.sum() for each in weights)
        expected += 1.5**2 * float((truth * (truth / ours).log()).sum())
    assert float(divergence(student, teacher, labels, 1.5)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(teacher, teacher, labels, 1.5)) == 0
    of_classes = divergence(student[:, 0], teacher[:, 0], labels[:, 0], 1.5)
    whole = divergence(student[:, :1], teacher[:, :1], labels[:, :1], 1.5)
    assert float(of_classes) == float(whole)


def test_distance_leaves_out_padding():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    valid = torch.tensor([[True, True, False], [True, False, False]])
    expected = float(((student - teacher).double() ** 2)[valid].sum())
    assert float(squared_distance(student, teacher, valid)) == pytest.approx(expected, rel=1e-6)
    student[~valid] = torch.nan
    assert float(squared_distance(student, teacher, valid)) == pytest.approx(expected, rel=1e-6)
    whole = squared_distance(student.nan_to_num(), teacher, None)
    assert float(whole) == pytest.approx(
        float(((student.nan_to_num() - teacher).double() ** 2).sum()), rel=1e-6
    )


def transformations(kept=None):
    made = Transformations(6, 2, 0, torch.device("cpu"), kept)
    assert made.named_parameters().keys() == {
        f"transformation.{quarter}.{part}" for quarter in range(4) for part in ("down", "up")
    }
    return made


def randomized(made):
    generator = torch.Generator().manual_seed(3)
    for each in made.up:
        each.data = torch.randn(each.shape, generator=generator)
    return made


def test_transformations_start_as_the_identity_and_are_low_rank():
    hidden = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    made = transformations()
    assert all(torch.equal(made.apply(hidden, quarter), hidden) for quarter in range(4))
    randomized(made)
    for quarter in range(4):
        matrix = torch.eye(6).double() + made.up[quarter].double() @ made.down[quarter].double()
        torch.testing.assert_close(
            made.apply(hidden, quarter).double(), hidden.double() @ matrix.T, rtol=1e-5, atol=1e-5
        )
    assert not torch.equal(made.down[0], made.down[1])


def test_removed_coordinates_are_zero_in_their_places():
    hidden = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    kept = [2, 5]
    placed = torch.zeros(2, 3, 6)
    placed[..., kept] = hidden[..., kept]
    made = transformations(kept)
    assert torch.equal(made.apply(hidden[..., kept], 1), placed)
    expected = randomized(transformations()).apply(placed, 1)
    torch.testing.assert_close(randomized(made).apply(hidden[..., kept], 1), expected)
