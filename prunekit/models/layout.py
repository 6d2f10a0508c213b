"""The blocks and linears of a model in pruning order."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Literal

import torch
from jaxtyping import Float, Int
from prunekit_kernels.pending import is_remote
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.architectures import Architecture
from prunekit.architectures.empty_linear import EmptyLinear
from prunekit.errors import NumericsError, ShapeError
from prunekit.models.adapters import effective_weight
from prunekit.models.causal import predicts_next_token
from prunekit.models.experts import expert_of
from prunekit.models.orientation import features
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.checks import Checks
from prunekit.patterns import Pattern


@dataclass(frozen=True)
class Linear:
    """One linear of one block.

    Attributes:
        name: Full name of the module in the model.
        path: Name relative to the block.
        outputs: Output features.
        inputs: Input features.
        skipped: Reason why it is left dense, or None if it is pruned.
        expert: Name of the expert it belongs to, relative to the block, or None.
    """

    name: str
    path: str
    outputs: int
    inputs: int
    skipped: str | None = None
    expert: str | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.outputs * self.inputs


@dataclass(frozen=True)
class Block:
    """One block: its full name and its linears, stage by stage."""

    name: str
    stages: tuple[tuple[Linear, ...], ...]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears in the order of the data flow."""
        return tuple(linear for stage in self.stages for linear in stage)

    @property
    def pruned(self) -> tuple[Linear, ...]:
        """Linears that are pruned."""
        return tuple(linear for linear in self.linears if linear.skipped is None)

    @property
    def pruned_stages(self) -> list[list[Linear]]:
        """Pruned linears stage by stage, without empty stages."""
        stages = ([linear for linear in stage if not linear.skipped] for stage in self.stages)
        return [stage for stage in stages if stage]


@dataclass(frozen=True)
class LinearSelection:
    """Selection of the linears to prune.

    Attributes:
        pattern: Pattern whose group sizes have to divide the linear's shape.
        skip: Name patterns (fnmatch), full or relative to the block, of linears to leave dense.
        on_indivisible: Whether a linear that the pattern does not fit is an error or is left dense.
    """

    pattern: Pattern
    skip: Sequence[str] = ()
    on_indivisible: Literal["error", "skip"] = "error"


def stack_runners(model: PreTrainedModel, architecture: Architecture) -> list[StackRunner]:
    """Return a runner for each stack, in execution order."""
    return [StackRunner(model, stack) for stack in architecture.stacks]


def list_blocks(stacks: Sequence[StackRunner], selection: LinearSelection) -> list[Block]:
    """Return the blocks of all stacks in execution order.

    Linears of attentions and feed-forwards without units have no weights and are left out.

    Raises:
        ShapeError: The pattern does not fit and ``on_indivisible`` is "error"; names the linears.
    """
    blocks, misfits = [], []
    for runner in stacks:
        named = zip(runner.names, runner.blocks, strict=True)
        for index, (name, module) in enumerate(named):
            inside = {path for path, _ in module.named_modules()}
            stages = tuple(
                tuple(
                    _linear(name, path, module, selection, misfits)
                    for path in stage.linears
                    if (not runner.stack.is_optional(path) or path in inside)
                    and not isinstance(module.get_submodule(path), EmptyLinear)
                )
                for stage in runner.stack.stages_of(index, inside)
            )
            dense = tuple(
                replace(_linear(name, path, module, selection, []), skipped=reason)
                for path, reason in runner.stack.dense
                if path in inside
            )
            blocks.append(Block(name, tuple(stage for stage in (*stages, dense) if stage)))
    if misfits:
        shown = misfits[:5] + [f"… and {len(misfits) - 5} more"] * (len(misfits) > 5)
        raise ShapeError(
            "\n".join(shown) + '\nChoose another pattern, or on_indivisible = "skip" to leave '
            "these layers dense."
        )
    return blocks


def _linear(
    block: str, path: str, module: nn.Module, selection: LinearSelection, misfits: list[str]
) -> Linear:
    outputs, inputs = features(module.get_submodule(path))
    name = f"{block}.{path}"
    linear = Linear(name, path, outputs, inputs, expert=expert_of(module, path))
    matching = [skip for skip in selection.skip if fnmatch(name, skip) or fnmatch(path, skip)]
    if matching:
        return replace(linear, skipped=f'skip = "{matching[0]}"')
    misfit = selection.pattern.why_not_applicable(outputs, inputs)
    if misfit and selection.on_indivisible == "error":
        misfits.append(f"{name}: pattern {misfit}.")
    return replace(linear, skipped=misfit)


def is_causal_language_model(model: PreTrainedModel, stacks: Sequence[StackRunner]) -> bool:
    """Return whether the model has one causal stack with a vocabulary head."""
    return len(stacks) == 1 and predicts_next_token(type(model), model.config)


@torch.no_grad()
def read_weight(
    block: nn.Module,
    linear: Linear,
    rows: slice = slice(None),
    checks: Checks | None = None,
) -> Float[Tensor, "O I"]:
    """Return a float32 copy of a linear's weight, adapters included.

    Args:
        block: The block module.
        linear: One of its linears.
        rows: Output features to copy; all by default.
        checks: Gets the condition that the weight is finite; None to look at once.

    Returns:
        A contiguous tensor, outputs first.

    Raises:
        NumericsError: The weight contains NaN or inf, in any row.
    """
    module = block.get_submodule(linear.path)
    weight = effective_weight(module)
    own = Checks() if checks is None else checks
    own.require_none(
        _count_broken(weight),
        lambda count: NumericsError(f"{linear.name}: {count} of its weights are NaN or inf."),
    )
    if checks is None:
        own.settle()
    return weight[rows].to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _count_broken(weight: Tensor) -> Int[Tensor, ""]:
    """Return how many entries are NaN or inf, on the weight's device."""
    # One sum detects them; on a CPU checking each entry takes several times as long.
    if not is_remote(weight.device) and weight.sum(dtype=torch.float32).isfinite():
        return torch.zeros((), dtype=torch.int64)
    return (~weight.isfinite()).sum()
