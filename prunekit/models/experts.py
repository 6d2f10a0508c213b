"""Run fused experts as linears that read the tokens routed to them.

transformers stores the matrices of all experts of a block in two three-dimensional tensors. Here
each expert gets linears that are views of these tensors, and the experts interface of transformers
runs them one expert after another. Statistics, methods and row sharding then only handle linears.

Shapes: T tokens, K experts per token, D features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from prunekit.architectures import declared_architecture
from prunekit.errors import CheckpointError

IMPLEMENTATION = "prunekit"
"""Name under which the implementation is registered in transformers."""
FUSED_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Fused tensor → linears of each expert that it holds, stacked along the output dimension."""
REQUIRED_FLAGS = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
"""Flags of the transformers module for which an expert is ``down(act(gate(x)) · up(x))``."""


class Expert(nn.Module):
    """One expert as three linears.

    Attributes:
        reads_all: Whether its linears read all tokens, not only those routed to it. Outputs for
            tokens that are not routed to it are discarded.
    """

    def __init__(self, owner: nn.Module, number: int) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not registered: the owner contains this module
        self.reads_all = False
        for fused, names in FUSED_PARTS.items():
            rows = getattr(owner, fused).detach()[number].chunk(len(names))
            for name, weight in zip(names, rows, strict=True):
                outputs, inputs = weight.shape
                linear = nn.Linear(inputs, outputs, bias=False, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=False)
                self.add_module(name, linear)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Return the output of the expert for its tokens."""
        gate, up, down = self.children()
        return down(self.__dict__["owner"]._apply_gate(torch.cat([gate(x), up(x)], -1)))


def unfuse(model: PreTrainedModel) -> list[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Replace the tensors of declared fused experts by linears, in place.

    Returns:
        Each changed module with the tensors that it had.

    Raises:
        CheckpointError: The experts are not plain gate, up and down projections.
    """
    replaced = []
    for name, module in _fused(model):
        for flag, value in REQUIRED_FLAGS.items():
            if getattr(module, flag, None) is not value:
                raise CheckpointError(
                    f"{name}: its experts have {flag} = {getattr(module, flag, None)}; only "
                    f"{value} is supported."
                )
        count = len(cast("Tensor", module.down_proj))
        experts = [Expert(module, number) for number in range(count)]
        tensors = {fused: module._parameters.pop(fused) for fused in FUSED_PARTS}
        for number, expert in enumerate(experts):
            module.add_module(str(number), expert)
        replaced.append((module, tensors))
    if replaced:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
        model.set_experts_implementation(IMPLEMENTATION)
    return replaced


@contextmanager
def unfused(model: PreTrainedModel) -> Iterator[None]:
    """Expose experts as linears inside the context; changes reach the fused tensors."""
    before = getattr(model.config, "_experts_implementation", None)
    replaced = unfuse(model)
    try:
        yield
    finally:
        for module, tensors in replaced:
            for name in list(module._modules):
                if isinstance(module._modules[name], Expert):
                    del module._modules[name]
            module._parameters.update(tensors)
        if replaced and before:
            model.set_experts_implementation(before)


def _fused(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    architecture = declared_architecture(model)
    names = {module: name for name, module in model.named_modules()}
    return [
        (names[block.get_submodule(path)], block.get_submodule(path))
        for stack in (architecture.stacks if architecture else ())
        for block in model.base_model.get_submodule(stack.blocks).children()
        for path in stack.experts
        if all(f"{path}.{fused}" in dict(block.named_parameters()) for fused in FUSED_PARTS)
    ]


def _forward(
    module: Any,  # noqa: ANN401
    hidden: Float[Tensor, "T D"],
    chosen: Int[Tensor, "T K"],
    shares: Float[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """Run each expert on its routed tokens and sum the weighted outputs.

    An expert without tokens still runs, on an empty input.
    """
    experts = [child for child in module.children() if isinstance(child, Expert)]
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=len(experts)).tolist()
    out = torch.zeros_like(hidden)
    for expert, slots in zip(experts, order.split(counts), strict=True):
        tokens = slots // chosen.shape[1]
        output = expert(hidden)[tokens] if expert.reads_all else expert(hidden[tokens])
        # Each token occurs at most once per expert, so additions happen in expert order.
        out.index_add_(0, tokens, (output * shares.flatten()[slots, None]).to(out.dtype))
    return out
