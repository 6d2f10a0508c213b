"""transformers quantizer that loads compressed checkpoints and models with removed units.

transformers calls everything that changes how weights are stored a quantizer. This module is
imported while transformers is still importing itself, so it may import only the base classes of
quantizers at module level; the kernels are imported when a model needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import override

from prunekit.checkpoint.compressed import QUANT_METHOD
from prunekit.checkpoint.formats import WeightLayout, format_named
from prunekit.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SparseConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of ``config.json``; see :mod:`prunekit.checkpoint.compressed`."""

    def __init__(
        self,
        format: str,  # noqa: A002  its name in config.json
        linears: dict[str, list[Any]],
        quant_method: str = QUANT_METHOD,
    ) -> None:
        self.quant_method = quant_method  # pyright: ignore
        self.format, self.linears = format, linears


class SparseQuantizer(HfQuantizer):
    """Replace dense linears by sparse layers before weights are loaded."""

    quantization_config: SparseConfig

    @override
    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        from prunekit.inference.sparse_linear import SparseLinear
        from prunekit.models.units.removal import restore

        restore(model)
        kind = format_named(self.quantization_config.format)
        replaced = 0
        for name, module in list(model.named_modules()):
            stored = self._layout(model, name)
            if stored is None:
                continue
            _check(name, module, stored)
            with torch.device("meta"):
                sparse = SparseLinear(
                    kind,
                    stored,
                    bias=module.bias is not None,
                    dtype=module.weight.dtype,  # pyright: ignore
                )
            model.set_submodule(name, sparse.train(module.training))
            replaced += 1
        count = len(self.quantization_config.linears)
        if count and not replaced:
            raise CheckpointError(
                f"config.json: none of the {count} layers that it lists as compressed is in "
                f"{type(model).__name__}. The config belongs to another model."
            )

    @override
    def _process_model_after_weight_loading(  # pyright: ignore  transformers ignores the result
        self, model: PreTrainedModel, **_: Any
    ) -> None:
        from prunekit.inference.sparse_linear import SparseLinear

        for name, module in model.named_modules():
            if isinstance(module, SparseLinear):
                stored = cast("WeightLayout", self._layout(model, name))
                expected = module.kind.empty(stored, torch.float32)
                for part, tensor in module.parts.items():
                    if tensor.shape != expected[part].shape:
                        raise CheckpointError(
                            f"{name}.{part} has shape {list(tensor.shape)}, but config.json "
                            f"implies {list(expected[part].shape)}. The files do not belong "
                            "together."
                        )
                module.arrange()

    def _layout(self, model: PreTrainedModel, name: str) -> WeightLayout | None:
        """Return the compressed layout of a module, or None.

        Names may differ by the base model prefix: a checkpoint can be saved with a head and loaded
        without it, or the other way round.
        """
        linears, prefix = self.quantization_config.linears, f"{model.base_model_prefix}."
        names = (name, prefix + name, name.removeprefix(prefix))
        return next((WeightLayout(*linears[known]) for known in names if known in linears), None)

    @override
    def is_serializable(self, *_: Any, **__: Any) -> bool:  # pyright: ignore  annotated as None
        """Return that ``save_pretrained`` can write the same checkpoint again."""
        return True

    @property
    @override
    def is_trainable(self) -> bool:  # pyright: ignore
        """True: adapters can be trained; compressed weights themselves are frozen."""
        return True

    @property
    @override
    def is_compileable(self) -> bool:
        return True

    @override
    def _dequantize(self, model: PreTrainedModel, dtype: str | torch.dtype | None = None) -> Any:
        """Replace sparse layers by dense linears."""
        from prunekit.inference.sparse_linear import SparseLinear

        for name, module in list(model.named_modules()):
            if isinstance(module, SparseLinear):
                target = getattr(torch, dtype) if isinstance(dtype, str) else dtype
                weight = module.dense().to(target)
                linear = nn.Linear(module.inputs, module.outputs, bias=False, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=False)
                linear.bias = module.bias  # pyright: ignore
                model.set_submodule(name, linear)
        return model


def _check(name: str, module: nn.Module, stored: WeightLayout) -> None:
    """Check that config.json and the model agree, before weights are loaded."""
    from prunekit.architectures.coverage import LINEAR_TYPES
    from prunekit.models.orientation import stored_transposed

    matches = type(module) in LINEAR_TYPES and stored_transposed(module) == stored.transposed
    if not matches or tuple(module.weight.shape) != stored.shape:  # pyright: ignore
        raise CheckpointError(
            f"config.json: {name} is listed as compressed from a linear layer whose weight has "
            f"shape {list(stored.shape)}, but the model has {module} there."
        )
