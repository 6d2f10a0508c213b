"""Layouts in which transformers stores the matrices of all experts.

Modules of its experts interface declare it by flags, so no model family is named here. Few modules
of experts are outside of that interface; their layouts are in ``KNOWN``, by class.

Shapes: E experts, O output features, I input features.
"""

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""Attributes that the experts interface sets on each module; others came in later versions."""
Parts = dict[str, tuple[str, ...]]
"""Fused tensor → linears of each expert that it holds, along the output dimension."""
FUSED_PARTS: Parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
UNGATED_PARTS: Parts = {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}
STACKED_PARTS: Parts = {
    "mlp.w1": ("gate_proj",),
    "mlp.v1": ("up_proj",),
    "mlp.w2": ("down_proj",),
}


@dataclass(frozen=True)
class ExpertLayout:
    """Positions of each expert's linears in the fused tensors.

    Attributes:
        gated: An expert is ``down(act(gate(x)) · up(x))``; otherwise ``down(act(up(x)))``.
        transposed: The tensors are [E, I, O]; otherwise [E, O, I].
        interleaved: Outputs of gate and up projection alternate; otherwise all gates come first.
        biased: Each tensor has biases [E, O] beside it, named with ``_bias`` at the end.
        call: The module is called with hidden states, numbers of experts and their shares
            ("routed"), with the hidden states of the experts one below the other, zeros where a
            token is not routed to it ("grouped"), or by its own forward, since it belongs to the
            experts interface ("interface").
        stacked: The tensors are [E · F, I] or, of the last linear, [E · F, O].
        identities: Experts with numbers above those of the matrices return their input.
        activation: Attribute of the module that is the activation.
        spare: Attribute of the module that counts the matrices of its first tensor, where some are
            of no expert; "" where all are.
    """

    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False
    call: Literal["interface", "routed", "grouped"] = "interface"
    stacked: bool = False
    identities: bool = False
    activation: str = "act_fn"
    spare: str = ""

    @property
    def parts(self) -> Parts:
        """Names of the fused tensors, and of the linears that each holds."""
        if self.stacked:
            return STACKED_PARTS
        return FUSED_PARTS if self.gated else UNGATED_PARTS

    @property
    def tensors(self) -> list[str]:
        """Names of all fused tensors, with those of biases."""
        return [*self.parts, *(f"{name}_bias" for name in self.parts if self.biased)]

    def stages(self, path: str) -> tuple[tuple[str, ...], ...]:
        """Return the linears that read the same input, in run order."""
        *inputs, last = [linear for linears in self.parts.values() for linear in linears]
        return tuple(f"{path}.*.{linear}" for linear in inputs), (f"{path}.*.{last}",)

    def is_transposed(self, fused: str) -> bool:
        """Return whether a tensor stores its matrices inputs first."""
        return self.transposed or (self.stacked and fused == [*self.parts][-1])

    def count(self, module: nn.Module) -> int:
        """Return the number of experts of a module, fused or as linears."""
        *_, last = self.parts
        if "0" in module._modules:
            return sum(name.isdigit() for name in module._modules)
        owner: Any = module
        return owner.num_experts if self.stacked else len(module.get_parameter(last))

    def matrices(self, module: nn.Module, fused: str) -> Tensor:
        """Return a view of a fused tensor with one entry per expert."""
        tensor = module.get_parameter(fused).detach()
        return tensor.unflatten(0, (self.count(module), -1)) if self.stacked else tensor

    def weights(self, fused: str, matrix: Tensor) -> dict[str, Float[Tensor, "O I"]]:
        """Return a view of each linear's weight in an expert's matrix.

        Args:
            fused: Name of the fused tensor.
            matrix: Its part for the expert.
        """
        return self.rows(fused, matrix.T if self.is_transposed(fused) else matrix)

    def rows(self, fused: str, values: Float[Tensor, "O ..."]) -> dict[str, Tensor]:
        """Return a view of the rows of each linear.

        Args:
            fused: Name of the fused tensor.
            values: Weights or biases of one expert, outputs first.
        """
        names = self.parts[fused]
        count = len(names)
        if self.interleaved:
            return {name: values[first::count] for first, name in enumerate(names)}
        return dict(zip(names, values.chunk(count), strict=True))


KNOWN: dict[str, ExpertLayout] = {
    "DbrxExperts": ExpertLayout(call="routed", stacked=True, activation="mlp.activation_fn"),
    "Llama4TextExperts": ExpertLayout(call="grouped", transposed=True),
    "LongcatFlashExperts": ExpertLayout(call="routed", identities=True, spare="total_experts"),
    "Step3p7Experts": ExpertLayout(call="routed"),
}
"""Layouts of modules outside of the experts interface, by the name of the class."""


def expert_layout(module: nn.Module) -> ExpertLayout | None:
    """Return the layout of a module's experts; None without experts."""
    if known := KNOWN.get(type(module).__name__):
        return known
    flags: dict[str, Any] = {name: getattr(module, name, None) for name in FLAGS}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        return None
    return ExpertLayout(
        gated=flags["has_gate"],
        transposed=flags["is_transposed"],
        interleaved=not flags["is_concatenated"],
        biased=flags["has_bias"],
    )


def is_list(module: nn.Module) -> bool:
    """Return whether a module's children are experts that it calls."""
    listed = isinstance(module, nn.ModuleDict | nn.ModuleList)
    return listed and type(module).__name__.endswith("Experts")


def is_fused(module: nn.Module) -> bool:
    """Return whether the layout of a module's experts is understood."""
    layout = expert_layout(module)
    if layout is None:
        return False
    own = {name for name, _ in module.named_parameters()}
    return own.issuperset(layout.tensors)


def fused_experts(module: nn.Module) -> dict[str, ExpertLayout]:
    """Return the layouts of all fused experts below ``module``, by relative name."""
    return {
        name: layout
        for name, child in module.named_modules()
        if is_fused(child) and (layout := expert_layout(child))
    }
