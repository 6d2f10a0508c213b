"""What stays of a block's weights, tuned until the pruned block gives what the dense model gave.

A solver makes each linear as good as its mask allows; what their errors do together, through
attention, activation and norms, it does not see. So the linears of a block are tuned together, with
their masks as they are, by Adam on the difference of hidden states: no labels, one block in memory.

Source: the idea of "A Free Lunch in LLM Compression", arXiv:2510.14444; it tunes smaller parts.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit.models.layout import Block
from prunekit.models.sequential.pipeline import LoadedBlock

Outputs = Callable[[int], Float[Tensor, "B T D"]]
"""Number of a batch → what the tuned block gives on it, less what the dense one gives."""
STEPS = 200
"""Steps of Adam, a batch each; batches are taken in turn."""
RATE = 0.01
"""Of the root mean square of a linear's kept weights: how far Adam's first step moves one of them;
it falls to nothing as a cosine."""


@torch.no_grad()
def reconstruct(
    visit: LoadedBlock, plan: Block, dtypes: Mapping[str, torch.dtype]
) -> dict[str, float]:
    """Tune the kept weights of a pruned block, in place, to what the dense one gives.

    Args:
        visit: A pruned block; the hidden states of its dense visit are those *after* it.
        plan: Its linears.
        dtypes: The types in which their weights will be stored.

    Returns:
        Relative squared error of the block's output before and after. Where it would not be lower,
        the weights are left.
    """
    assert visit.dense is not None
    names = [f"{linear.path}.weight" for linear in plan.pruned]
    parameters = {name: value.detach() for name, value in visit.block.named_parameters()}
    tuned = {name: parameters[name].to(torch.float32, copy=True).requires_grad_() for name in names}
    inputs, targets = visit.hidden, visit.dense.hidden

    def block(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        weights = {name: value.to(parameters[name].dtype) for name, value in tuned.items()}
        return torch.func.functional_call(visit.block, parameters | weights, args, kwargs)

    def outputs(number: int) -> Float[Tensor, "B T D"]:
        bound = visit.runner.bind(visit.index, inputs[number], visit.contexts[number], block)
        return bound().float() - targets[number].float()

    energy = _energy(visit, targets)
    before = _energy(visit, map(outputs, range(len(inputs)))) / energy
    if before > 0:
        _descend(visit, tuned, outputs, len(inputs))
    after = _energy(visit, map(outputs, range(len(inputs)))) / energy
    if after < before:
        for linear, name in zip(plan.pruned, names, strict=True):
            parameters[name].copy_(tuned[name].to(dtypes[linear.name]))
    return {"block_error": before, "recovered_error": min(before, after)}


@torch.no_grad()
def _energy(visit: LoadedBlock, values: Iterable[Tensor]) -> float:
    """Return the sum of squares, over the tokens of all ranks."""
    total = torch.zeros((), dtype=torch.float64, device=visit.device)
    for value in values:
        total += value.float().square().sum(dtype=torch.float64)
    visit.ranks.all_reduce_sum(total, "errors")
    return float(total)


def _descend(visit: LoadedBlock, tuned: dict[str, Tensor], outputs: Outputs, count: int) -> None:
    """Move kept weights down the gradient; all ranks by the sum of theirs."""
    keep = {name: value != 0 for name, value in tuned.items()}
    groups = [
        {"params": [value], "lr": RATE * _typical(value.detach(), keep[name])}
        for name, value in tuned.items()
    ]
    optimizer = torch.optim.Adam(groups, eps=1e-20)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        with torch.enable_grad():
            outputs(step % count).square().mean().backward()
        for name, value in tuned.items():
            assert value.grad is not None
            value.grad.mul_(keep[name])
            visit.ranks.all_reduce_sum(value.grad, "gradients")
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _typical(value: Tensor, keep: Tensor) -> float:
    """Return the root mean square of what is kept; 0 where nothing is."""
    return float(value.norm() / keep.sum().clamp(min=1).sqrt())
