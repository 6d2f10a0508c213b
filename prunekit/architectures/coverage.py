"""Check that an architecture names every linear of a block."""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunekit.architectures.base import Stack
from prunekit.architectures.empty_linear import EmptyLinear
from prunekit.architectures.expert_layout import FLAGS, fused_experts
from prunekit.errors import CheckpointError

LINEAR_TYPES = (nn.Linear, Conv1D)
CONVOLUTION_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ADVICE = (
    "Declare the family: a file of ten lines in prunekit/architectures/, or an entry point of the "
    "group prunekit.architectures in your own package; CONTRIBUTING.md shows an example."
)


def named_linears(module: nn.Module) -> dict[str, nn.Module]:
    """Return all linears below ``module`` by relative name, in definition order."""
    return {
        name: child for name, child in module.named_modules() if isinstance(child, LINEAR_TYPES)
    }


def base_model_prefix(model: PreTrainedModel) -> str:
    """Return the prefix of ``model.base_model`` in full names, "" or "name."."""
    name = next(name for name, module in model.named_modules() if module is model.base_model)
    return f"{name}." if name else ""


def has_module(module: nn.Module, name: str) -> bool:
    """Return whether ``module`` has a descendant called ``name``."""
    return any(name == descendant for descendant, _ in module.named_modules())


def check_coverage(model: PreTrainedModel, stack: Stack) -> None:
    """Check that the stages name every linear of the blocks.

    Raises:
        CheckpointError: A block contains experts or a linear that no stage names, or lacks a linear
            that a stage names and that is not optional.
    """
    refuse_unknown_experts(model, stack.blocks)
    for index, block in enumerate(model.base_model.get_submodule(stack.blocks).children()):
        where, found = (
            f"{base_model_prefix(model)}{stack.blocks}.{index}",
            set(named_linears(block)),
        )
        found |= {name for name, each in block.named_modules() if isinstance(each, EmptyLinear)}
        found |= {
            linear
            for path, layout in fused_experts(block).items()
            for linears in layout.stages(path)
            for linear in linears
        }
        stages = stack.stages_of(index, (name for name, _ in block.named_modules()))
        named = {linear for stage in stages for linear in stage.linears}
        for name in sorted(found - named - dict(stack.dense).keys()):
            raise CheckpointError(
                f"{where}.{name}: no stage of the architecture {model.config.model_type!r} names "
                "this linear, so it would silently stay dense. Known linears: "
                f"{', '.join(sorted(named))}. {ADVICE}"
            )
        for name in sorted(name for name in named - found if not stack.is_optional(name)):
            raise CheckpointError(
                f"{where}.{name}: the architecture {model.config.model_type!r} names this linear, "
                f"the block does not have it. It has: {', '.join(sorted(found))}. {ADVICE}"
            )


def matrices_outside_linears(block: nn.Module) -> dict[str, nn.Parameter]:
    """Return a block's weights that hold matrices and belong to no linear.

    Tables of embeddings and kernels of convolutions are none; experts of a known layout neither.
    """
    experts = {
        f"{path}.{tensor}".removeprefix(".")
        for path, layout in fused_experts(block).items()
        for tensor in layout.tensors
    }
    return {
        path: weight
        for where, module in block.named_modules()
        if not isinstance(module, (*LINEAR_TYPES, *CONVOLUTION_TYPES, nn.Embedding))
        for name, weight in module.named_parameters(recurse=False)
        if (path := f"{where}.{name}".removeprefix(".")) not in experts
        and weight.ndim > 1
        and min(weight.shape[-2:]) > 1
    }


def refuse_unknown_experts(model: PreTrainedModel, blocks: str) -> None:
    """Check that most weights of each block are in known linears.

    Raises:
        CheckpointError: More weights are in other tensors; names the largest.
    """
    for index, block in model.base_model.get_submodule(blocks).named_children():
        others = matrices_outside_linears(block)
        if not others:
            continue
        name = max(others, key=lambda name: others[name].numel())
        known = sum(linear.weight.numel() for linear in named_linears(block).values())  # pyright: ignore
        known += sum(
            block.get_parameter(f"{path}.{tensor}").numel()
            for path, layout in fused_experts(block).items()
            for tensor in layout.parts
        )
        if sum(weight.numel() for weight in others.values()) > known:
            owner = block.get_submodule(name.rpartition(".")[0])
            missing = [flag for flag in FLAGS if not isinstance(getattr(owner, flag, None), bool)]
            raise CheckpointError(
                f"{base_model_prefix(model)}{blocks}.{index}.{name}: {type(owner).__name__} holds "
                f"matrices {list(others[name].shape)} in one tensor, more than all linears of the "
                "block, and does not say how: it is no module of the experts interface of "
                f"transformers (it has no {', '.join(missing)}), so they would stay dense."
            )
