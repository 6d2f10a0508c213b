"""Linear layer with a compressed weight, in memory as in the file.

Shapes: O output features, I input features.
"""

from typing import Any, Self, cast

import torch
from jaxtyping import Float
from prunekit_kernels import Sparse24, expand24, from_fragments, has_fragments, sparse24_mma, unpack
from prunekit_kernels import to_fragments as in_fragments
from prunekit_kernels.sparse24_mma import runs_mma
from torch import Tensor, nn
from torch.nn.functional import linear
from typing_extensions import override

from prunekit.checkpoint.compressed import check_parts, compress_weight
from prunekit.checkpoint.formats import Format, Parts, WeightLayout, format_named
from prunekit.errors import ConfigError
from prunekit.inference import speed_table


class SparseLinear(nn.Module):
    """``y = x Wᵀ + b`` with a compressed, frozen W.

    The parts of the weight are buffers named as in the file. On NVIDIA GPUs since Ampere, a 2:4
    weight is permuted into fragment order when it is moved to the device, with the same number of
    bytes, and back into row order when it is moved elsewhere or saved in a state dict. No dense
    copy is kept: a weight that is expanded for many tokens is freed after the product.

    Attributes:
        kind: The format.
        layout: Shape and number of stored values.
        inputs: Input features.
        outputs: Output features.
        fragments: Whether the parts are in fragment order.
        max_kernel_tokens: Largest number of tokens multiplied without expanding the weight; None if
            the shape was not measured on this device.
    """

    def __init__(
        self, kind: Format, stored: WeightLayout, *, bias: bool, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        self.kind, self.layout = kind, stored
        self.inputs, self.outputs = stored.inputs, stored.outputs
        for name, part in kind.empty(stored, dtype).items():
            self.register_buffer(name, part)
        self.bias = nn.Parameter(torch.empty(stored.outputs, dtype=dtype)) if bias else None
        self.fragments, self.max_kernel_tokens = False, None
        self._semi_weight: Tensor | None = None
        self._use_semi_structured = False

    @classmethod
    def of(cls, linear: nn.Linear, kind: str) -> Self:
        """Return the sparse layer for a pruned dense linear, sharing its bias.

        Raises:
            ConfigError: There is no format ``kind``.
            ValueError: The weight does not fit the format.
        """
        chosen, weight = format_named(kind), linear.weight.detach()
        if reason := chosen.why_not_storable(weight):
            raise ValueError(f"{kind} does not fit this weight: {reason}")
        parts, stored = compress_weight(chosen, "weight", weight, transposed=False)
        made = cls(
            chosen, cast("WeightLayout", stored), bias=linear.bias is not None, dtype=weight.dtype
        )
        for name, part in parts.items():
            made._buffers[name.removeprefix("weight.")] = part
        made.bias = linear.bias
        made.arrange()
        return made

    @property
    def in_features(self) -> int:
        """Input features, by the name that peft asks for."""
        return self.inputs

    @property
    def out_features(self) -> int:
        """Output features, by the name that peft asks for."""
        return self.outputs

    @property
    def parts(self) -> dict[str, Tensor]:
        """Parts of the weight by name, in the order of the format."""
        return {name: cast("Tensor", self._buffers[name]) for name in self.kind.parts}

    @override
    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        y = self._multiply(x.reshape(-1, self.inputs))
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.outputs)

    def _multiply(self, x: Tensor) -> Tensor:
        if self._use_semi_structured and len(x) > (self.max_kernel_tokens or 0):
            return linear(x, self._semi_structured())
        if self.fragments:
            return sparse24_mma(x, self.parts["weight"], self.parts["keep"], self.max_kernel_tokens)
        return self.kind.multiply(x, self.parts, self.max_kernel_tokens)

    def _semi_structured(self) -> Tensor:
        """Return the weight as a torch semi-structured tensor, converted once."""
        if self._semi_weight is None:
            from torch.sparse import to_sparse_semi_structured

            self._semi_weight = to_sparse_semi_structured(expand24(*self._rows()))
        return self._semi_weight

    def dense(self) -> Float[Tensor, "O I"]:
        """Return the dense weight."""
        parts = dict(zip(self.kind.parts, self._rows(), strict=True))
        return self.kind.expand(parts, self.inputs)

    def set_kept(self, weight: Float[Tensor, "O I"]) -> None:
        """Update the kept weights from a dense weight, ignoring its other values.

        Raises:
            ConfigError: The values are rounded to few bits.
        """
        if self.kind.typed_by != "weight":
            raise ConfigError(
                f'values in the format "{self.kind.name}" are rounded, so that no training goes '
                "into them. Load a dense folder: prunekit convert --format dense."
            )
        parts = dict(zip(self.kind.parts, self._rows(), strict=True))
        mask = unpack(parts["keep"], self.inputs)
        # A stored zero only pads a group of 2:4 and remains zero.
        kept = torch.where(
            parts["weight"].flatten() != 0, weight[mask].to(parts["weight"].dtype), 0
        )
        parts["weight"] = kept.view(parts["weight"].shape)
        self._put(tuple(parts.values()))
        self.fragments = False
        self.arrange()

    def arrange(self) -> None:
        """Choose part order and kernels for the current device."""
        weight = self.parts["weight"]
        use_fragments = (
            self.kind.name == "2:4"
            and runs_mma(weight)
            and has_fragments(self.outputs, self.inputs, weight.dtype)
        )
        if use_fragments and not self.fragments:
            self._put(in_fragments(Sparse24(*self.parts.values())))
        elif self.fragments and not use_fragments:
            self._put(from_fragments(Sparse24(*self.parts.values())))
        self.fragments = use_fragments
        self._semi_weight, self.max_kernel_tokens, self._use_semi_structured = None, None, False
        if weight.is_cuda:
            self._tune(weight)

    def _tune(self, weight: Tensor) -> None:
        dtype = str(weight.dtype).removeprefix("torch.")
        layer = speed_table.layer_key(self.kind.name, dtype, self.outputs, self.inputs)
        if choice := speed_table.look_up(torch.cuda.get_device_name(weight.device), layer):
            self.max_kernel_tokens, self._use_semi_structured = (
                choice.max_kernel_tokens,
                choice.semi_structured,
            )

    def _rows(self) -> tuple[Tensor, ...]:
        parts = tuple(self.parts.values())
        return tuple(from_fragments(Sparse24(*parts))) if self.fragments else parts

    def _put(self, parts: tuple[Tensor, ...]) -> None:
        self._buffers.update(zip(self.kind.parts, parts, strict=True))

    @override
    def _apply(self, *arguments: Any, **options: Any) -> Self:
        """Move or cast, as ``.to()`` does.

        Both commute with the order of the parts.
        """
        super()._apply(*arguments, **options)
        self.arrange()
        return self

    @override
    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, part in zip(self.kind.parts, self._rows(), strict=True):
            destination[prefix + name] = part

    def check(self, name: str, parts: Parts) -> None:
        """Check parts before they become this layer's weight.

        Raises:
            CheckpointError: A part is missing or corrupt; the message names the layer.
        """
        check_parts(self.kind, name or type(self).__name__, parts, self.layout)

    @override
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **options: Any
    ) -> None:
        parts = {name: state_dict.get(prefix + name) for name in self.kind.parts}
        given = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
        # Without any part the weight is unchanged; PyTorch refuses that unless told otherwise.
        if given:
            self.check(prefix.removesuffix("."), given)
        self._put(self._rows())
        self.fragments = False
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)
        self.arrange()

    @override
    def extra_repr(self) -> str:
        kept = self.parts["weight"].numel() / max(1, self.inputs * self.outputs)
        return (
            f"in_features={self.inputs}, out_features={self.outputs}, "
            f"bias={self.bias is not None}, format={self.kind.name}, kept={kept:.3g}"
        )
