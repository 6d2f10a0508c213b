"""Layouts in which transformers stores the matrices of all experts.

Modules of its experts interface declare it by flags, so no model family is named here. Others are
not understood.

Shapes: E experts, O output features, I input features.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
"""Attributes that the experts interface sets on each module."""
FUSED_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Fused tensor → linears of each expert that it holds, along the output dimension."""
UNGATED_PARTS = {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""The same for experts without a gate."""


@dataclass(frozen=True)
class ExpertLayout:
    """Positions of each expert's linears in the fused tensors.

    Attributes:
        gated: An expert is ``down(act(gate(x)) · up(x))``; otherwise ``down(act(up(x)))``.
        transposed: The tensors are [E, I, O]; otherwise [E, O, I].
        interleaved: Outputs of gate and up projection alternate; otherwise all gates come first.
        biased: Each tensor has one of biases [E, O] beside it, named with ``_bias`` at its end.
    """

    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Names of the fused tensors, and of the linears that each holds."""
        return FUSED_PARTS if self.gated else UNGATED_PARTS

    @property
    def tensors(self) -> list[str]:
        """Names of all fused tensors, with those of biases."""
        return [*self.parts, *(f"{name}_bias" for name in self.parts if self.biased)]

    def stages(self, path: str) -> tuple[tuple[str, ...], ...]:
        """Return the linears that read the same input, in run order."""
        return tuple(
            tuple(f"{path}.*.{linear}" for linear in linears) for linears in self.parts.values()
        )

    def weights(self, fused: str, matrix: Tensor) -> dict[str, Float[Tensor, "O I"]]:
        """Return a view of each linear's weight in an expert's matrix.

        Args:
            fused: Name of the fused tensor.
            matrix: Its part for the expert.
        """
        return self.rows(fused, matrix.T if self.transposed else matrix)

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


def expert_layout(module: nn.Module) -> ExpertLayout | None:
    """Return the layout of a module's experts; None without experts."""
    flags: dict[str, Any] = {name: getattr(module, name, None) for name in FLAGS}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        return None
    return ExpertLayout(
        gated=flags["has_gate"],
        transposed=flags["is_transposed"],
        interleaved=not flags["is_concatenated"],
        biased=flags["has_bias"],
    )


def is_fused(module: nn.Module) -> bool:
    """Return whether the layout of a module's experts is understood."""
    layout = expert_layout(module)
    return layout is not None and all(name in module._parameters for name in layout.tensors)


def fused_experts(module: nn.Module) -> dict[str, ExpertLayout]:
    """Return the layouts of all fused experts below ``module``, by relative name."""
    return {
        name: layout
        for name, child in module.named_modules()
        if is_fused(child) and (layout := expert_layout(child))
    }
