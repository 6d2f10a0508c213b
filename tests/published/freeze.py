"""Writes this folder: published Wanda and SparseGPT in float64.

``python -m tests.published.freeze`` (from the root of the repository) writes the files anew,
without using prunekit. The inputs are small integers, so that their Gram matrix is exact in float32
and every implementation starts from the same; they are correlated, with outliers, and two are dead.
With this seed no decision is close (:func:`margin`), so that float32 decides the same.

Wanda: Sun et al., arXiv:2306.11695, Algorithm 1. In each row the ⌊sparsity · I⌋ lowest of
``|W| · ‖X‖`` are pruned, or of every m neighbours the m − n lowest.

SparseGPT: Frantar & Alistarh, arXiv:2301.00774, Algorithm 1: blocks of 128 columns, 1 % damping.
Unstructured, the lowest ``w² / U[j, j]²`` of a block are pruned, over all rows; n:m, they are
compared when the sweep reaches them. The authors' program prunes every value not above the one with
index k, which is k + 1 weights and more on ties; here exactly k are pruned, and
``first_block_as_programmed`` shows the program's result.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent
SEED = 1
BLOCK = 128
DAMPING = 0.01
CLOSE = 1e-4


def inputs(seed: int) -> dict[str, Tensor]:
    """Return tokens [320, 192] and a weight [24, 192].

    Inputs 17 and 150 are dead.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(320, 24, generator=generator) @ torch.randn(24, 192, generator=generator)
    tokens += 2 * torch.randn(320, 192, generator=generator)
    tokens[:, ::37] *= 6
    tokens[:, [17, 150]] = 0
    weight = torch.randn(24, 192, generator=generator)
    weight *= torch.rand(24, 1, generator=generator) + 0.5
    return {"tokens": tokens.round().clamp(-127, 127).to(torch.int8), "weight": weight}


def wanda(tokens: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Return the keep masks."""
    score = weight.double().abs() * tokens.double().norm(dim=0)
    return {
        "keep_0.5": without_lowest(score, 96),
        "keep_0.6": without_lowest(score, 115),
        "keep_2:4": without_lowest_of(score, 2, 4),
        "keep_4:8": without_lowest_of(score, 4, 8),
    }


def sparsegpt(tokens: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Return the keep masks and the new weights."""
    gram = tokens.double().T @ tokens.double()
    unstructured, keep = swept(weight.double(), gram, half_of_block, BLOCK)
    two_of_four, keep_two = swept(
        weight.double(), gram, lambda score: without_lowest_of(score, 2, 4), 4
    )
    _, programmed = swept(weight.double(), gram, half_of_block_as_programmed, BLOCK)
    return {
        "keep_0.5": keep,
        "weight_0.5": unstructured,
        "keep_2:4": keep_two,
        "weight_2:4": two_of_four,
        "first_block_as_programmed": programmed[:, :BLOCK].contiguous(),
    }


def swept(
    weight: Tensor, gram: Tensor, choose: Callable[[Tensor], Tensor], together: int
) -> tuple[Tensor, Tensor]:
    """Return the new weight and keep mask, selecting ``together`` columns at once."""
    weight, upper = weight.clone(), factor(gram)
    weight[:, gram.diagonal() == 0] = 0
    keep = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        errors = torch.zeros_like(weight[:, start:end])
        for j in range(start, end):
            if (j - start) % together == 0:
                group = slice(j, min(j + together, end))
                keep[:, group] = choose((weight[:, group] / upper.diagonal()[group]) ** 2)
            error = torch.where(keep[:, j], 0, weight[:, j]) / upper[j, j]
            weight[:, j:end] -= torch.outer(error, upper[j, j:end])
            weight[~keep[:, j], j] = 0
            errors[:, j - start] = error
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight, keep


def factor(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the damped inverse Gram matrix."""
    gram = gram.clone()
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)


def half_of_block(score: Tensor) -> Tensor:
    """Prune exactly half, over all rows."""
    return without_lowest(score.reshape(1, -1), score.numel() // 2).view(score.shape)


def half_of_block_as_programmed(score: Tensor) -> Tensor:
    """Prune as the authors' program: up to the value with index ``numel / 2``."""
    return score > score.flatten().sort().values[score.numel() // 2]


def without_lowest(score: Tensor, count: int) -> Tensor:
    """Prune the ``count`` lowest of each row.

    Raises:
        ValueError: The decision is close.
    """
    if margin(score, count) < CLOSE:
        raise ValueError(f"a decision is closer than {CLOSE}; take another seed")
    keep = torch.ones_like(score, dtype=torch.bool)
    return keep.scatter_(1, score.argsort(1)[:, :count], False)  # noqa: FBT003


def without_lowest_of(score: Tensor, kept: int, group: int) -> Tensor:
    """Prune all but the ``kept`` highest of every ``group`` neighbours."""
    return without_lowest(score.reshape(-1, group), group - kept).view(score.shape)


def margin(score: Tensor, count: int) -> float:
    """Return the smallest relative gap between pruned and kept scores."""
    ordered = score.sort(1).values
    return float((1 - ordered[:, count - 1] / ordered[:, count]).min())


def main() -> None:
    """Write the files."""
    given = inputs(SEED)
    for name, tensors in (
        ("inputs", given),
        ("wanda", wanda(**given)),
        ("sparsegpt", sparsegpt(**given)),
    ):
        save_file(tensors, FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    main()
