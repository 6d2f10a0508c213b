"""Fused experts run as linears, each of which reads the tokens that are routed to it.

transformers keeps the matrices of all experts of a block in two tensors of three dimensions. Here
each expert has linears that are views of them, and the experts interface of transformers runs these
one expert after another. So statistics, solvers and ranks need to know of linears only.

Shapes: T tokens, K experts that a token goes to, E experts, D features, F neurons of an expert.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from prunekit.architectures import declared
from prunekit.errors import CheckpointError

NAME = "prunekit"
"""Of the implementation, where transformers registers them."""
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Fused tensor of a module → the linears of each expert that it stands for, one above the other."""
PLAIN = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
"""How transformers says that an expert is ``down(act(gate(x)) · up(x))`` and nothing more."""


class Expert(nn.Module):
    """One expert, as linears.

    Attributes:
        reads_all: Its linears read all tokens, and not only those routed to it; what it gives for
            the others is dropped.
    """

    def __init__(self, owner: nn.Module, number: int) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not a submodule: it holds this one
        self.reads_all = False
        for fused, names in PARTS.items():
            rows = getattr(owner, fused).detach()[number].chunk(len(names))
            for name, weight in zip(names, rows, strict=True):
                outputs, inputs = weight.shape
                linear = nn.Linear(inputs, outputs, bias=False, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=False)
                self.add_module(name, linear)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Return what the expert makes of tokens."""
        gate, up, down = self.children()
        return down(self.__dict__["owner"]._apply_gate(torch.cat([gate(x), up(x)], -1)))


def unfuse(model: PreTrainedModel) -> list[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Give fused experts, where they are declared, linears in the place of their tensors.

    Returns:
        Each module and the tensors that it had.

    Raises:
        CheckpointError: The experts are of another kind than gate, up and down.
    """
    found = []
    for name, module in _fused(model):
        for flag, value in PLAIN.items():
            if getattr(module, flag, None) is not value:
                raise CheckpointError(
                    f"{name}: its experts have {flag} = {getattr(module, flag, None)}, and only "
                    f"those with {value} can be pruned yet."
                )
        count = len(cast("Tensor", module.down_proj))
        experts = [Expert(module, number) for number in range(count)]
        tensors = {fused: module._parameters.pop(fused) for fused in PARTS}
        for number, expert in enumerate(experts):
            module.add_module(str(number), expert)
        found.append((module, tensors))
    if found:
        ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
        model.set_experts_implementation(NAME)
    return found


@contextmanager
def unfused(model: PreTrainedModel) -> Iterator[None]:
    """Hold the experts of a model as linears; what became of these is in its tensors afterwards."""
    before = getattr(model.config, "_experts_implementation", None)
    found = unfuse(model)
    try:
        yield
    finally:
        for module, tensors in found:
            for name in list(module._modules):
                if isinstance(module._modules[name], Expert):
                    del module._modules[name]
            module._parameters.update(tensors)
        if found and before:
            model.set_experts_implementation(before)


def _fused(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    architecture = declared(model)
    names = {module: name for name, module in model.named_modules()}
    return [
        (names[block.get_submodule(path)], block.get_submodule(path))
        for stack in (architecture.stacks if architecture else ())
        for block in model.base_model.get_submodule(stack.blocks).children()
        for path in stack.experts
        if all(f"{path}.{fused}" in dict(block.named_parameters()) for fused in PARTS)
    ]


def _forward(
    module: Any,  # noqa: ANN401
    hidden: Float[Tensor, "T D"],
    chosen: Int[Tensor, "T K"],
    shares: Float[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """Run each expert on the tokens that chose it; an expert that none did runs on no token."""
    experts = [child for child in module.children() if isinstance(child, Expert)]
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=len(experts)).tolist()
    out = torch.zeros_like(hidden)
    for expert, slots in zip(experts, order.split(counts), strict=True):
        tokens = slots // chosen.shape[1]
        given = expert(hidden)[tokens] if expert.reads_all else expert(hidden[tokens])
        # No token is here twice, so that the order of additions is that of the experts.
        out.index_add_(0, tokens, (given * shares.flatten()[slots, None]).to(out.dtype))
    return out
