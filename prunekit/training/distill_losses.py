"""Distances from a teacher's outputs, drawn layers and transformations.

Shapes: B samples, T tokens, C classes or token ids, D features of the teacher's hidden states, R
rank.
"""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import kl_div, linear, log_softmax

from prunekit.structured.token_ids import IGNORED

QUARTERS = 4
"""Parts of depth, from each of which a block of the teacher is drawn."""


def drawn_blocks(depth: int, seed: int, step: int) -> dict[int, int]:
    """Return the block drawn from each quarter of depth.

    Of fewer than four blocks some quarters have none. The draws depend on seed and step alone: they
    are the same on all ranks, and no state is needed to go on with them.

    Args:
        depth: Number of blocks.
        seed: Seed of all draws.
        step: Number of the training step.
    """
    generator = random.Random(f"{seed} {step}")
    parts = {q: range(q * depth // QUARTERS, (q + 1) * depth // QUARTERS) for q in range(QUARTERS)}
    return {quarter: generator.choice(part) for quarter, part in parts.items() if part}


def divergence(
    student: Float[Tensor, "... C"],
    teacher: Float[Tensor, "... C"],
    labels: Int[Tensor, "..."],
    temperature: float,
) -> Float[Tensor, ""]:
    """Return ``T² Σ KL(softmax(z_t / T) ‖ softmax(z_s / T))`` over the predictions.

    Args:
        student: Logits z_s.
        teacher: Logits z_t.
        labels: Label of each prediction; where it is ignored there is none.
        temperature: T.
    """
    valid = labels != IGNORED
    ours, theirs = (log_softmax(z[valid].float() / temperature, -1) for z in (student, teacher))
    return temperature**2 * kl_div(ours, theirs, reduction="sum", log_target=True)


def squared_distance(
    student: Float[Tensor, "B T D"],
    teacher: Float[Tensor, "B T D"],
    valid: Bool[Tensor, "B T"] | None,
) -> Float[Tensor, ""]:
    """Return the summed squared difference over the valid tokens.

    Args:
        student: Hidden states.
        teacher: Hidden states.
        valid: False for padding; None if there is none.
    """
    difference = student.float() - teacher.float()
    return (difference if valid is None else difference[valid]).square().sum()


class Transformations:
    """``Tr(h) = h + B A h`` for each quarter of depth.

    One for each quarter: each is trained at every step, where one for each block would be trained
    only when that is drawn; and quarters may differ, as scale and meaning of the stream do over
    depth. If coordinates of the student's stream were removed, h has zeros in their places.

    Attributes:
        down: A of each quarter, [R, D].
        up: B of each quarter, [D, R].
    """

    def __init__(
        self,
        width: int,
        rank: int,
        seed: int,
        device: torch.device,
        kept: Sequence[int] | None = None,
    ) -> None:
        """Make transformations that are the identity.

        Args:
            width: Features of the teacher's hidden states.
            rank: R.
            seed: Seed of A, which is Gaussian.
            device: Device of the parameters.
            kept: Coordinates that the student has; None for all.
        """
        generator = torch.Generator().manual_seed(seed)
        self._kept = None if kept is None else torch.as_tensor(kept, device=device)
        self.down = [
            nn.Parameter((torch.randn(rank, width, generator=generator) / width**0.5).to(device))
            for _ in range(QUARTERS)
        ]
        self.up = [nn.Parameter(torch.zeros(width, rank, device=device)) for _ in range(QUARTERS)]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name."""
        named = {f"transformation.{q}.down": each for q, each in enumerate(self.down)}
        return named | {f"transformation.{q}.up": each for q, each in enumerate(self.up)}

    def apply(self, hidden: Float[Tensor, "B T K"], quarter: int) -> Float[Tensor, "B T D"]:
        """Return transformed hidden states.

        Args:
            hidden: Hidden states of the student.
            quarter: Number of the quarter.
        """
        whole = hidden.float()
        if self._kept is not None:
            wide = whole.new_zeros(*whole.shape[:-1], self.down[quarter].shape[1])
            whole = wide.index_copy(-1, self._kept, whole)
        return whole + linear(linear(whole, self.down[quarter]), self.up[quarter])
