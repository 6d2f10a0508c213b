"""A linear layer that holds its weight compressed, in memory as in the file.

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

from prunekit.checkpoint.compressed import pack
from prunekit.checkpoint.formats import Format, Stored, format_named
from prunekit.inference import speed_table


class SparseLinear(nn.Module):
    """``y = x Wᵀ + b`` with W compressed; the weight itself is not trained.

    The parts of the weight are buffers named as in the file. On NVIDIA GPUs from Ampere on, a 2:4
    weight is permuted into fragment order when it arrives there, in the same bytes; it leaves in
    row order, be it to another device or to a state dict. No dense copy stays in memory: what is
    expanded for many tokens is freed when the product is done.

    Attributes:
        kind: The format.
        inputs: Features that go in.
        outputs: Features that come out.
        fragments: Whether the parts are in fragment order.
        reach: The most tokens for which no weight is expanded; None where nothing was measured.
    """

    def __init__(
        self, kind: Format, stored: Stored, *, bias: bool, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        self.kind, self.inputs, self.outputs = kind, stored.inputs, stored.outputs
        for name, part in kind.empty(stored, dtype).items():
            self.register_buffer(name, part)
        self.bias = nn.Parameter(torch.empty(stored.outputs, dtype=dtype)) if bias else None
        self.fragments, self.reach = False, None
        self._semi: Tensor | None = None
        self._wants_semi = False

    @classmethod
    def of(cls, linear: nn.Linear, kind: str) -> Self:
        """Return the sparse layer of a pruned dense one, which keeps its bias.

        Raises:
            ConfigError: ``kind`` is no format.
            ValueError: The weight does not fit the format.
        """
        chosen, weight = format_named(kind), linear.weight.detach()
        if misfit := chosen.why_not_storable(weight):
            raise ValueError(f"{kind} does not fit this weight: {misfit}")
        parts, stored = pack(chosen, "weight", weight, transposed=False)
        made = cls(chosen, cast("Stored", stored), bias=linear.bias is not None, dtype=weight.dtype)
        for name, part in parts.items():
            made._buffers[name.removeprefix("weight.")] = part
        made.bias = linear.bias
        made.arrange()
        return made

    @property
    def parts(self) -> dict[str, Tensor]:
        """The parts of the weight, in the order they are in."""
        return {name: cast("Tensor", self._buffers[name]) for name in self.kind.parts}

    @override
    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        y = self._multiply(x.reshape(-1, self.inputs))
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.outputs)

    def _multiply(self, x: Tensor) -> Tensor:
        if self._wants_semi and len(x) > (self.reach or 0):
            return linear(x, self._semi_structured())
        if self.fragments:
            return sparse24_mma(x, self.parts["weight"], self.parts["keep"], self.reach)
        return self.kind.multiply(x, self.parts, self.reach)

    def _semi_structured(self) -> Tensor:
        """Return the weight as torch multiplies it for many tokens, converted once."""
        if self._semi is None:
            from torch.sparse import to_sparse_semi_structured

            self._semi = to_sparse_semi_structured(expand24(*self._rows()))
        return self._semi

    def dense(self) -> Float[Tensor, "O I"]:
        """Return the dense weight."""
        parts = dict(zip(self.kind.parts, self._rows(), strict=True))
        return self.kind.expand(parts, self.inputs)

    def set_kept(self, weight: Float[Tensor, "O I"]) -> None:
        """Take new values where a weight is stored; what ``weight`` has elsewhere is dropped."""
        parts = dict(zip(self.kind.parts, self._rows(), strict=True))
        mask = unpack(parts["keep"], self.inputs)
        # A zero that only fills up a group of 2:4 is no weight.
        kept = torch.where(
            parts["weight"].flatten() != 0, weight[mask].to(parts["weight"].dtype), 0
        )
        parts["weight"] = kept.view(parts["weight"].shape)
        self._put(tuple(parts.values()))
        self.fragments = False
        self.arrange()

    def arrange(self) -> None:
        """Put the parts in the order that suits the device they are on, and look up its speed."""
        weight = self.parts["weight"]
        wanted = (
            self.kind.name == "2:4"
            and runs_mma(weight)
            and has_fragments(self.outputs, self.inputs, weight.dtype)
        )
        if wanted and not self.fragments:
            self._put(in_fragments(Sparse24(*self.parts.values())))
        elif self.fragments and not wanted:
            self._put(from_fragments(Sparse24(*self.parts.values())))
        self.fragments = wanted
        self._semi, self.reach, self._wants_semi = None, None, False
        if weight.is_cuda:
            self._tune(weight)

    def _tune(self, weight: Tensor) -> None:
        dtype = str(weight.dtype).removeprefix("torch.")
        layer = speed_table.key(self.kind.name, dtype, self.outputs, self.inputs)
        if found := speed_table.look_up(torch.cuda.get_device_name(weight.device), layer):
            self.reach, self._wants_semi = found.max_kernel_tokens, found.semi

    def _rows(self) -> tuple[Tensor, ...]:
        parts = tuple(self.parts.values())
        return tuple(from_fragments(Sparse24(*parts))) if self.fragments else parts

    def _put(self, parts: tuple[Tensor, ...]) -> None:
        self._buffers.update(zip(self.kind.parts, parts, strict=True))

    @override
    def _apply(self, *arguments: Any, **options: Any) -> Self:
        """Move or cast, as ``.to()`` and its kin do; both commute with the order of the parts."""
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

    @override
    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._put(self._rows())
        self.fragments = False
        super()._load_from_state_dict(*arguments, **options)
        self.arrange()

    @override
    def extra_repr(self) -> str:
        kept = self.parts["weight"].numel() / max(1, self.inputs * self.outputs)
        return (
            f"in_features={self.inputs}, out_features={self.outputs}, "
            f"bias={self.bias is not None}, format={self.kind.name}, kept={kept:.3g}"
        )
