"""Tune a pruned block's kept weights to the dense block's output.

A solver minimises the error of each linear for its mask; the effect of these errors together,
through attention, activation and norms, it does not see. So the kept weights of all linears of a
block are tuned together by Adam on the difference of hidden states: no labels, one block in memory.

Source: the idea of "A Free Lunch in LLM Compression", arXiv:2510.14444, which tunes smaller parts.

Shapes: B samples, T tokens, D features.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit.models.layout import Block
from prunekit.models.sequential.loaded_block import LoadedBlock

Difference = Callable[[int], Float[Tensor, "B T D"]]
"""Number of a batch → output of the tuned block on it minus that of the dense block."""
STEPS = 200
"""Steps of Adam, of one batch each; batches are taken in turn."""
RATE = 0.01
"""Learning rate, relative to the root mean square of a linear's kept weights; decays to 0 as a
cosine."""


@torch.no_grad()
def tune_block(
    loaded: LoadedBlock, block: Block, dtypes: Mapping[str, torch.dtype]
) -> dict[str, float]:
    """Tune the kept weights of a pruned block in place.

    Args:
        loaded: A pruned block; the hidden states of its dense block are already the outputs.
        block: Its linears.
        dtypes: Full name of each linear → dtype in which its weight will be stored.

    Returns:
        Relative squared error of the block's output before and after. Where tuning would not lower
        it, the weights are left unchanged.
    """
    assert loaded.dense is not None
    names = [f"{linear.path}.weight" for linear in block.pruned]
    parameters = {name: value.detach() for name, value in loaded.module.named_parameters()}
    tuned = {name: parameters[name].to(torch.float32, copy=True).requires_grad_() for name in names}
    targets = loaded.dense.hidden

    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        weights = {name: value.to(parameters[name].dtype) for name, value in tuned.items()}
        return torch.func.functional_call(loaded.module, parameters | weights, args, kwargs)

    def difference(batch: int) -> Float[Tensor, "B T D"]:
        return loaded.bind(batch, run)().float() - targets[batch].float()

    count = len(targets)
    energy = _energy(loaded, targets)
    before = _energy(loaded, map(difference, range(count))) / energy
    if before > 0:
        _descend(loaded, tuned, difference, count)
    after = _energy(loaded, map(difference, range(count))) / energy
    if after < before:
        for linear, name in zip(block.pruned, names, strict=True):
            parameters[name].copy_(tuned[name].to(dtypes[linear.name]))
    return {"block_error": before, "recovered_error": min(before, after)}


@torch.no_grad()
def _energy(loaded: LoadedBlock, values: Iterable[Tensor]) -> float:
    """Return the sum of squares over the tokens of all ranks."""
    total = torch.zeros((), dtype=torch.float64, device=loaded.device)
    for value in values:
        total += value.float().square().sum(dtype=torch.float64)
    loaded.ranks.all_reduce_sum(total, "errors")
    return float(total)


def _descend(
    loaded: LoadedBlock, tuned: dict[str, Tensor], difference: Difference, count: int
) -> None:
    """Minimise the squared difference over kept weights; gradients are summed over ranks."""
    keep = {name: value != 0 for name, value in tuned.items()}
    groups = [
        {"params": [value], "lr": RATE * _kept_rms(value.detach(), keep[name])}
        for name, value in tuned.items()
    ]
    optimizer = torch.optim.Adam(groups, eps=1e-20)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        with torch.enable_grad():
            difference(step % count).square().mean().backward()
        for name, value in tuned.items():
            assert value.grad is not None
            value.grad.mul_(keep[name])
            loaded.ranks.all_reduce_sum(value.grad, "gradients")
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _kept_rms(value: Tensor, keep: Tensor) -> float:
    """Return the root mean square of kept weights, or 0."""
    return float(value.norm() / keep.sum().clamp(min=1).sqrt())
