"""How transformers loads a checkpoint that prunekit compressed, or whose blocks differ in size.

transformers calls everything that changes how weights are stored a quantizer. This is imported
while transformers still imports itself, so of it only what quantizers derive from is there; the
kernels wait until a model needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import override

from prunekit.checkpoint.compressed import METHOD
from prunekit.checkpoint.formats import Stored, format_named
from prunekit.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SparseConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of ``config.json``; see :mod:`prunekit.checkpoint.compressed`."""

    def __init__(
        self,
        format: str,  # noqa: A002  its name in config.json
        linears: dict[str, list[Any]],
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = quant_method  # pyright: ignore
        self.format, self.linears = format, linears


class SparseQuantizer(HfQuantizer):
    """Puts what the files hold in the place of dense linear layers before weights are read."""

    quantization_config: SparseConfig

    @override
    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        from prunekit.inference.sparse_linear import SparseLinear
        from prunekit.models.units.removal import restore

        restore(model)
        kind = format_named(self.quantization_config.format)
        linears = {name: Stored(*said) for name, said in self.quantization_config.linears.items()}
        prefix = f"{model.base_model_prefix}."
        replaced = 0
        for name, module in list(model.named_modules()):
            # Saved with a head, loaded without, or the other way round.
            names = (name, prefix + name, name.removeprefix(prefix))
            stored = next((linears[known] for known in names if known in linears), None)
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
        if linears and not replaced:
            raise CheckpointError(
                f"config.json: none of the {len(linears)} layers that it calls compressed is in "
                f"{type(model).__name__}. The config belongs to another model."
            )

    @override
    def _process_model_after_weight_loading(  # pyright: ignore  transformers ignores the result
        self, model: PreTrainedModel, **_: Any
    ) -> None:
        from prunekit.inference.sparse_linear import SparseLinear

        for name, module in model.named_modules():
            if isinstance(module, SparseLinear):
                stored = self._said(model, name)
                expected = module.kind.empty(stored, torch.float32)
                for part, found in module.parts.items():
                    if found.shape != expected[part].shape:
                        raise CheckpointError(
                            f"{name}.{part} has shape {list(found.shape)}, but config.json makes "
                            f"it {list(expected[part].shape)}. The files do not belong together."
                        )
                module.arrange()

    def _said(self, model: PreTrainedModel, name: str) -> Stored:
        linears, prefix = self.quantization_config.linears, f"{model.base_model_prefix}."
        names = (name, prefix + name, name.removeprefix(prefix))
        return next(Stored(*linears[known]) for known in names if known in linears)

    @override
    def is_serializable(self, *_: Any, **__: Any) -> bool:  # pyright: ignore  said to be None
        """Say that ``save_pretrained`` gives the same folder back."""
        return True

    @property
    @override
    def is_trainable(self) -> bool:  # pyright: ignore
        """Adapters beside compressed weights learn; the weights themselves stay as they are."""
        return True

    @property
    @override
    def is_compileable(self) -> bool:
        return True

    @override
    def _dequantize(self, model: PreTrainedModel, dtype: str | torch.dtype | None = None) -> Any:
        """Put dense layers in the place of sparse ones."""
        from prunekit.inference.sparse_linear import SparseLinear

        for name, module in list(model.named_modules()):
            if isinstance(module, SparseLinear):
                wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
                weight = module.dense().to(wanted)
                linear = nn.Linear(module.inputs, module.outputs, bias=False, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=False)
                linear.bias = module.bias  # pyright: ignore
                model.set_submodule(name, linear)
        return model


def _check(name: str, module: nn.Module, stored: Stored) -> None:
    """Refuse where config.json and the model disagree, before transformers reads a weight."""
    from transformers.pytorch_utils import Conv1D

    right = type(module) is (Conv1D if stored.transposed else nn.Linear)
    if not right or tuple(module.weight.shape) != stored.shape:  # pyright: ignore
        raise CheckpointError(
            f"config.json: says that {name} is compressed from a linear layer whose weight has "
            f"shape {list(stored.shape)}, but the model has {module} there."
        )
