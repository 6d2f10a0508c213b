"""The linears of a model in the order in which they are pruned, and why some are not."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunekit.architectures import Architecture
from prunekit.errors import NumericsError, ShapeError
from prunekit.models.experts import Expert
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.patterns import Pattern


@dataclass(frozen=True)
class Linear:
    """One linear of one block.

    Attributes:
        name: Full name of the module in the model.
        path: Its name relative to the block.
        outputs: Output features.
        inputs: Input features.
        skipped: Why it stays dense, or None.
        expert: The expert that it belongs to, if it does: its name relative to the block.
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
    """One block: its name in the model and its linears, stage by stage."""

    name: str
    stages: tuple[tuple[Linear, ...], ...]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears, in the order in which data flows."""
        return tuple(linear for stage in self.stages for linear in stage)

    @property
    def pruned(self) -> tuple[Linear, ...]:
        """The linears that are not skipped."""
        return tuple(linear for linear in self.linears if linear.skipped is None)

    @property
    def pruned_stages(self) -> list[list[Linear]]:
        """The same, stage by stage, without stages that are skipped whole."""
        stages = ([linear for linear in stage if not linear.skipped] for stage in self.stages)
        return [stage for stage in stages if stage]


@dataclass(frozen=True)
class Selection:
    """Which linears are pruned: what the pattern fits, less what the user leaves out."""

    pattern: Pattern
    skip: Sequence[str] = ()
    on_indivisible: Literal["error", "skip"] = "error"


def runners(model: PreTrainedModel, architecture: Architecture) -> list[StackRunner]:
    """Return a runner for each stack, in run order."""
    return [StackRunner(model, stack) for stack in architecture.stacks]


def layout(stacks: Sequence[StackRunner], selection: Selection) -> list[Block]:
    """Return the blocks of all stacks in run order.

    Raises:
        ShapeError: The pattern does not fit; every linear it does not fit is named.
    """
    blocks, misfits = [], []
    for runner in stacks:
        for name, module in zip(runner.names, runner.blocks, strict=True):
            inside = {path for path, _ in module.named_modules()}
            stages = tuple(
                tuple(
                    _linear(name, path, module, selection, misfits)
                    for path in stage.linears
                    if not runner.stack.may_lack(path) or path in inside
                )
                for stage in runner.stack.stages_of(inside)
            )
            blocks.append(Block(name, tuple(stage for stage in stages if stage)))
    if misfits:
        shown = misfits[:5] + [f"… and {len(misfits) - 5} more"] * (len(misfits) > 5)
        raise ShapeError(
            "\n".join(shown) + '\nChoose another pattern, or on_indivisible = "skip" to leave '
            "these layers dense."
        )
    return blocks


def orientation(module: nn.Module) -> tuple[int, int, bool]:
    """Return outputs, inputs, and whether the weight is stored inputs first (GPT-2's Conv1D)."""
    rows, columns = cast("Tensor", module.weight).shape
    return (columns, rows, True) if isinstance(module, Conv1D) else (rows, columns, False)


def _linear(
    block: str, path: str, module: nn.Module, selection: Selection, misfits: list[str]
) -> Linear:
    outputs, inputs, _ = orientation(module.get_submodule(path))
    name = f"{block}.{path}"
    owner = path.rpartition(".")[0]
    expert = owner if isinstance(module.get_submodule(owner), Expert) else None
    linear = Linear(name, path, outputs, inputs, expert=expert)
    matching = [skip for skip in selection.skip if fnmatch(name, skip) or fnmatch(path, skip)]
    if matching:
        return replace(linear, skipped=f'skip = "{matching[0]}"')
    misfit = selection.pattern.misfit(outputs, inputs)
    if misfit and selection.on_indivisible == "error":
        misfits.append(f"{name}: pattern {misfit}.")
    return replace(linear, skipped=misfit)


def is_causal_language_model(model: PreTrainedModel, stacks: Sequence[StackRunner]) -> bool:
    """Say whether perplexity is defined: one causal stack with a head over the vocabulary."""
    kind = type(model).__name__
    return len(stacks) == 1 and kind.endswith(("ForCausalLM", "LMHeadModel"))


@torch.no_grad()
def read(block: nn.Module, linear: Linear, rows: slice = slice(None)) -> Float[Tensor, "O I"]:
    """Return a float32 copy of a linear's weight, outputs first, or of some of its rows.

    Raises:
        NumericsError: It holds NaN or inf, in whatever row.
    """
    module = block.get_submodule(linear.path)
    weight = cast("Tensor", module.weight).detach()
    # One sum tells; to look at each entry takes several times as long.
    sound = weight.sum(dtype=torch.float32).isfinite()
    if not sound and (count := int((~weight.isfinite()).sum())):
        raise NumericsError(f"{linear.name}: {count} of its weights are NaN or inf.")
    if orientation(module)[2]:
        return weight.T[rows].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return weight[rows].to(torch.float32, copy=True)
