"""What the blocks of a model hold, and the refusal of whatever an architecture would leave out."""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunekit.architectures.base import Stack
from prunekit.errors import CheckpointError

LINEAR = (nn.Linear, Conv1D)
CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ADVICE = (
    "Declare the family: a file of ten lines in prunekit/architectures/, or an entry point of the "
    "group prunekit.architectures in a package of your own; CONTRIBUTING.md shows one."
)


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """Return every linear below ``module`` by its name relative to it, in order of definition."""
    return {name: child for name, child in module.named_modules() if isinstance(child, LINEAR)}


def prefix(model: PreTrainedModel) -> str:
    """Return what full names of ``model`` put before names of ``model.base_model``."""
    name = next(name for name, module in model.named_modules() if module is model.base_model)
    return f"{name}." if name else ""


def holds(module: nn.Module, name: str) -> bool:
    """Say whether ``module`` has a descendant called ``name``."""
    return any(name == found for found, _ in module.named_modules())


def check(model: PreTrainedModel, stack: Stack) -> None:
    """Refuse a stack that does not name each linear of each of its blocks.

    Raises:
        CheckpointError: A block holds fused experts or a linear that no stage names, or lacks a
            linear that a stage names and that is not optional.
    """
    refuse_fused_experts(model, stack.blocks)
    for index, block in enumerate(model.base_model.get_submodule(stack.blocks).children()):
        where, found = f"{prefix(model)}{stack.blocks}.{index}", set(linears(block))
        stages = stack.stages_of(name for name, _ in block.named_modules())
        named = {linear for stage in stages for linear in stage.linears}
        for name in sorted(found - named):
            raise CheckpointError(
                f"{where}.{name}: no stage of the architecture {model.config.model_type!r} names "
                "this linear, so it would be left dense without a word. Known linears: "
                f"{', '.join(sorted(named))}. {ADVICE}"
            )
        for name in sorted(name for name in named - found if not stack.may_lack(name)):
            raise CheckpointError(
                f"{where}.{name}: the architecture {model.config.model_type!r} names this linear, "
                f"the block does not have it. It has: {', '.join(sorted(found))}. {ADVICE}"
            )


def refuse_fused_experts(model: PreTrainedModel, blocks: str) -> None:
    """Refuse weights of the blocks that hold several matrices in one tensor.

    Raises:
        CheckpointError: Names the first such weight.
    """
    for where, module in model.base_model.get_submodule(blocks).named_modules():
        for name, weight in module.named_parameters(recurse=False):
            of_experts = "experts" in where.split(".") and weight.ndim > 1
            of_many = weight.ndim > 2 and min(weight.shape) > 1
            if (of_experts or of_many) and not isinstance(module, (*LINEAR, *CONVOLUTION)):
                kind = "fused experts" if "expert" in where else "several matrices in one weight"
                raise CheckpointError(
                    f"{prefix(model)}{blocks}.{where}.{name}: {kind} {list(weight.shape)} are not "
                    "supported here, and they would be left dense without a word. Choose a model "
                    "whose blocks keep their matrices in linears, or whose experts are declared."
                )
