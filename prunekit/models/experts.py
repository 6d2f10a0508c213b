"""Run fused experts as linears that read the tokens routed to them.

transformers stores the matrices of all experts of a block in two or three tensors. Here each expert
gets linears that are views of these tensors, and they run one expert after another. Statistics,
methods and row sharding then only handle linears.

Shapes: E experts, T tokens, K experts per token, D features.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from prunekit.architectures.expert_layout import expert_layout, is_fused, is_list

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
            weights = layout.weights(fused, layout.matrices(owner, fused)[number])
            biases: dict[str, Tensor] = {}
            if layout.biased:
                biases = layout.rows(fused, layout.matrices(owner, f"{fused}_bias")[number])
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
        if not self.layout.gated:
            output = down(owner.act_fn(*neurons))
        elif not hasattr(owner, "_apply_gate"):
            gate, up = neurons
            output = down(attrgetter(self.layout.activation)(owner)(gate) * up)
        elif self.layout.interleaved:
            output = down(owner._apply_gate(torch.stack(neurons, -1).flatten(-2)))
        else:
            output = down(owner._apply_gate(torch.cat(neurons, -1)))
        with_norm = getattr(owner, "has_post_expert_norm", False)
        return owner.post_expert_norm(output) if with_norm else output


@dataclass(frozen=True)
class Fused:
    """A module whose experts are linears now, as it was before.

    Attributes:
        module: The module.
        tensors: Its fused tensors, by name.
        implementation: Name of its implementation in the experts interface, if it belongs to it.
    """

    module: nn.Module
    tensors: dict[str, nn.Parameter]
    implementation: str | None


def unfuse(model: PreTrainedModel) -> list[Fused]:
    """Replace the tensors of fused experts by linears, in place."""
    replaced: list[Fused] = []
    modules = [*model.modules()]
    for module in filter(is_fused, modules):
        layout, owner = expert_layout(module), cast("Any", module)
        assert layout is not None
        experts = [Expert(module, number) for number in range(layout.count(module))]
        tensors = {
            fused: _owner(module, fused)._parameters.pop(_last(fused)) for fused in layout.tensors
        }
        for number, expert in enumerate(experts):
            module.add_module(str(number), expert)
        implementation = None
        if layout.call == "interface":
            implementation = owner.config._experts_implementation
            owner.config._experts_implementation = IMPLEMENTATION
        else:
            module.forward = partial(_FORWARDS[layout.call], module)
        replaced.append(Fused(module, cast("dict[str, nn.Parameter]", tensors), implementation))
    for module in filter(is_list, modules):
        module.forward = partial(_listed, module, type(module).forward)
        replaced.append(Fused(module, {}, None))
    if replaced:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _routed)
    return replaced


@contextmanager
def unfused(model: PreTrainedModel) -> Iterator[None]:
    """Expose experts as linears inside the context; changes reach the fused tensors."""
    replaced = unfuse(model)
    try:
        yield
    finally:
        for fused in reversed(replaced):
            module = fused.module
            for name in list(module._modules):
                if isinstance(module._modules[name], Expert):
                    del module._modules[name]
            for name, tensor in fused.tensors.items():
                _owner(module, name)._parameters[_last(name)] = tensor
            if fused.implementation is None:
                del module.forward
            else:
                cast("Any", module).config._experts_implementation = fused.implementation


def _owner(module: nn.Module, tensor: str) -> nn.Module:
    return module.get_submodule(tensor.rpartition(".")[0])


def _last(tensor: str) -> str:
    return tensor.rpartition(".")[2]


def _experts(module: nn.Module) -> list[Expert]:
    return [child for child in module.children() if isinstance(child, Expert)]


def _routed(
    module: Any,  # noqa: ANN401
    hidden: Float[Tensor, "... D"],
    chosen: Int[Tensor, "T K"],
    shares: Float[Tensor, "T K"],
) -> Float[Tensor, "... D"]:
    """Run each expert on its routed tokens and sum the weighted outputs.

    An expert without tokens still runs, on an empty input.
    """
    experts, shape = _experts(module), hidden.shape
    hidden = hidden.reshape(-1, shape[-1])
    order = chosen.flatten().argsort(stable=True)
    # Numbers above those of the experts mean that a token has fewer experts than others.
    counts = chosen.flatten().bincount(minlength=len(experts))[: len(experts)].tolist()
    others = order[sum(counts) :]
    order = order[: sum(counts)]
    out = torch.zeros_like(hidden)
    for expert, slots in zip(experts, order.split(counts), strict=True):
        tokens = slots // chosen.shape[1]
        output = expert(hidden)[tokens] if expert.reads_all else expert(hidden[tokens])
        # Each token occurs at most once per expert, so additions happen in expert order.
        out.index_add_(0, tokens, (output * shares.flatten()[slots, None]).to(out.dtype))
    if experts[0].layout.identities:
        tokens = others // chosen.shape[1]
        same = hidden[tokens] * shares.flatten()[others, None]
        out.index_add_(0, tokens, same.to(out.dtype))
    return out.reshape(shape)


def _listed(
    module: nn.Module,
    forward: Callable[..., Tensor],
    hidden: Float[Tensor, "T D"],
    *routing: Tensor,
) -> Tensor:
    """Run a list of experts, each in any case.

    Args:
        module: The list.
        forward: Its own forward.
        hidden: Hidden states of all tokens.
        routing: Choice of the experts, and shares.
    """
    silent: list[nn.Module] = []
    for expert in module.children():
        reads_all = getattr(expert, "reads_all", False)
        expert(hidden if reads_all else hidden[:0])
        silent += expert.modules() if reads_all else ()
    with ExitStack() as stack:
        for each in silent:  # they are observed on all tokens already
            stack.enter_context(_without_hooks(each))
        return forward(module, hidden, *routing)


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    hooks = module._forward_pre_hooks, module._forward_hooks
    module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        module._forward_pre_hooks, module._forward_hooks = hooks


def expert_of(block: nn.Module, path: str) -> str | None:
    """Return the path of a linear's expert, or None."""
    owner = path.rpartition(".")[0]
    if isinstance(block.get_submodule(owner), Expert):
        return owner
    while owner:
        parent = owner.rpartition(".")[0]
        if is_list(block.get_submodule(parent)):
            return owner
        owner = parent
    return None


def _grouped(module: nn.Module, hidden: Float[Tensor, "ET D"]) -> Float[Tensor, "ET D"]:
    """Run each expert on its rows that are not zeros."""
    experts = _experts(module)
    groups = hidden.view(len(experts), -1, hidden.shape[-1])
    out = torch.zeros_like(groups)
    for number, expert in enumerate(experts):
        tokens = groups[number].any(-1).nonzero().squeeze(-1)
        if expert.reads_all:
            # A token that is not routed to it is scaled by the shares of its own experts.
            out[number, tokens] = expert(groups.sum(0))[tokens]
        else:
            out[number, tokens] = expert(groups[number, tokens])
    return out.view_as(hidden)


_FORWARDS: dict[str, Callable[..., Tensor]] = {"routed": _routed, "grouped": _grouped}
