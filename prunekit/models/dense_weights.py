"""Weights that no run prunes, named for plan and report."""

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel

from prunekit.architectures.coverage import (
    CONVOLUTION_TYPES,
    matrices_outside_linears,
    named_linears,
)
from prunekit.architectures.expert_layout import expert_layout
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.vocabulary import output_heads


def dense_notes(stacks: Sequence[StackRunner]) -> Iterator[str]:
    """Yield notes about matrices in blocks that are not those of linears.

    Kernels of convolutions over several channels are among them, and tables of embeddings.
    Those of all blocks of a stack are one note, with ``*`` for the number of the block.
    """
    for runner in stacks:
        found: dict[str, str] = {}
        spare: dict[str, int] = {}
        for name, block in zip(runner.names, runner.blocks, strict=True):
            where = f"{name.rpartition('.')[0]}.*"
            for path in (*matrices_outside_linears(block), *_weights_of_modules(block)):
                owner = block.get_submodule(path.rpartition(".")[0])
                found.setdefault(f"{where}.{path}", type(owner).__name__)
            for path, module in block.named_modules():
                layout = expert_layout(module)
                if layout and layout.spare:
                    count = getattr(module, layout.spare) - layout.count(module)
                    spare |= {f"{where}.{path}.{next(iter(layout.parts))}": count} if count else {}
        for path, kind in found.items():
            yield f"{path} stays dense: its module, {kind}, is no linear."
        for path, count in spare.items():
            yield f"The last {count} matrices of {path} stay dense: no expert uses them."


def _weights_of_modules(block: nn.Module) -> Iterator[str]:
    """Yield weights of convolutions and of embeddings of a block."""
    for path, module in block.named_modules():
        mixes_channels = isinstance(module, CONVOLUTION_TYPES) and module.weight.shape[1] > 1
        if mixes_channels or isinstance(module, nn.Embedding):
            yield f"{path}.weight"


def outside_note(model: PreTrainedModel, stacks: Sequence[StackRunner]) -> Iterator[str]:
    """Yield a note about linears outside of the blocks, as in towers."""
    blocks = {block for runner in stacks for block in runner.blocks}
    heads = {*output_heads(model)}

    def search(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if child in blocks or child in heads:
                continue
            if blocks.isdisjoint(child.modules()):
                yield from [path] if named_linears(child) else []
            else:
                yield from search(child, f"{path}.")

    if names := [*search(model, "")]:
        verb = "stays" if len(names) == 1 else "stay"
        yield f"{', '.join(names)} {verb} dense: outside of the blocks."
