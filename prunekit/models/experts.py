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

from prunekit.architectures.expert_layout import expert_layout, is_fused

IMPLEMENTATION = "prunekit"
"""Name under which the implementation is registered in transformers."""


class Expert(nn.Module):
    """One expert as linears.

    Attributes:
        layout: Layout of the fused tensors.
        reads_all: Whether its linears read all tokens, not only those routed to it. Outputs for
            tokens that are not routed to it are discarded.
    """

    def __init__(self, owner: nn.Module, number: int) -> None:
        super().__init__()
        layout = expert_layout(owner)
        assert layout is not None
        self.__dict__["owner"] = owner  # not registered: the owner contains this module
        self.layout = layout
        self.reads_all = False
        for fused in layout.parts:
            weights = layout.weights(fused, getattr(owner, fused).detach()[number])
            biases: dict[str, Tensor] = {}
            if layout.biased:
                biases = layout.rows(fused, getattr(owner, f"{fused}_bias").detach()[number])
            for name, weight in weights.items():
                outputs, inputs = weight.shape
                linear = nn.Linear(inputs, outputs, bias=layout.biased, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=False)
                if layout.biased:
                    linear.bias = nn.Parameter(biases[name], requires_grad=False)
                self.add_module(name, linear)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Return the output of the expert for its tokens."""
        owner: Any = self.__dict__["owner"]
        *inputs, down = self.children()
        neurons = [linear(x) for linear in inputs]
        if not owner.has_gate:
            output = down(owner.act_fn(*neurons))
        elif owner.is_concatenated:
            output = down(owner._apply_gate(torch.cat(neurons, -1)))
        else:
            output = down(owner._apply_gate(torch.stack(neurons, -1).flatten(-2)))
        return owner.post_expert_norm(output) if owner.has_post_expert_norm else output


def unfuse(model: PreTrainedModel) -> list[tuple[nn.Module, dict[str, Any], Any]]:
    """Replace the tensors of fused experts by linears, in place.

    Returns:
        Each changed module with the tensors and the implementation that it had.
    """
    replaced = []
    for module in [each for each in model.modules() if is_fused(each)]:
        layout, owner = expert_layout(module), cast("Any", module)
        assert layout is not None
        experts = [Expert(module, number) for number in range(len(owner.down_proj))]
        tensors = {fused: module._parameters.pop(fused) for fused in layout.tensors}
        for number, expert in enumerate(experts):
            module.add_module(str(number), expert)
        replaced.append((module, tensors, owner.config._experts_implementation))
        owner.config._experts_implementation = IMPLEMENTATION
    if replaced:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
    return replaced


@contextmanager
def unfused(model: PreTrainedModel) -> Iterator[None]:
    """Expose experts as linears inside the context; changes reach the fused tensors."""
    replaced = unfuse(model)
    try:
        yield
    finally:
        for module, tensors, implementation in reversed(replaced):
            for name in list(module._modules):
                if isinstance(module._modules[name], Expert):
                    del module._modules[name]
            module._parameters.update(tensors)
            cast("Any", module).config._experts_implementation = implementation


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
    # Numbers above those of the experts mean that a token has fewer experts than others.
    counts = chosen.flatten().bincount(minlength=len(experts))[: len(experts)].tolist()
    order = order[: sum(counts)]
    out = torch.zeros_like(hidden)
    for expert, slots in zip(experts, order.split(counts), strict=True):
        tokens = slots // chosen.shape[1]
        output = expert(hidden)[tokens] if expert.reads_all else expert(hidden[tokens])
        # Each token occurs at most once per expert, so additions happen in expert order.
        out.index_add_(0, tokens, (output * shares.flatten()[slots, None]).to(out.dtype))
    return out
