"""transformers quantizer that loads compressed checkpoints and models with removed units.

transformers calls everything that changes how weights are stored a quantizer. This module is
imported while transformers is still importing itself, so it may import only the base classes of
quantizers at module level; the kernels are imported when a model needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import override

from prunekit.checkpoint.compressed import (
    EXPAND,
    QUANT_METHOD,
    compressed_weights,
    expands,
    layer_name,
)
from prunekit.checkpoint.formats import WeightLayout
from prunekit.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunekit.checkpoint.reader import Checkpoint
    from prunekit.inference.sparse_linear import SparseLinear


class SparseConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of ``config.json``; see :mod:`prunekit.checkpoint.compressed`."""

    def __init__(
        self,
        format: str | None = None,  # noqa: A002  its name in config.json
        linears: dict[str, list[Any]] | None = None,
        quant_method: str = QUANT_METHOD,
        **_: object,
    ) -> None:
        self.quant_method = quant_method  # pyright: ignore
        self.format, self.linears = format, linears


class SparseQuantizer(HfQuantizer):
    """Replace dense linears by sparse layers, and check their tensors."""

    quantization_config: SparseConfig

    @override
    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from prunekit.inference.sparse_linear import SparseLinear
        from prunekit.models.units.removal import restore

        restore(model)
        self._checkpoint = checkpoint = self._open(model, checkpoint_files or [])
        replaced = 0
        for name, module in list(model.named_modules()):
            if not (stored := self._stored_name(model, name)):
                continue
            weight = checkpoint.compressed[stored]
            _check_layer(name, module, weight.layout)
            if checkpoint_files:
                _check_files(checkpoint, stored, module)
            with torch.device("meta"):
                sparse = SparseLinear(
                    weight.format,
                    weight.layout,
                    bias=module.bias is not None,
                    dtype=module.weight.dtype,  # pyright: ignore
                )
            model.set_submodule(name, sparse.train(module.training))
            replaced += 1
        if checkpoint.compressed and not replaced:
            raise CheckpointError(
                f"config.json: none of the {len(checkpoint.compressed)} layers that it lists as "
                f"compressed is in {type(model).__name__}. The config belongs to another model."
            )

    @override
    def _process_model_after_weight_loading(  # pyright: ignore  transformers ignores the result
        self, model: PreTrainedModel, **_: Any
    ) -> None:
        from prunekit.inference.sparse_linear import SparseLinear

        dense = expands()
        for name, module in model.named_modules():
            if not isinstance(module, SparseLinear):
                continue
            self._check_loaded(model, name, module)
            if not dense:
                module.arrange()
            elif any(part.is_meta for part in module.parts.values()):
                raise CheckpointError(
                    f"{self._checkpoint.folder}: {name} is offloaded to files, where {EXPAND} "
                    "cannot expand it. Unset it, or load a dense folder (prunekit convert)."
                )
        if dense:
            self.dequantize(model)

    def _check_loaded(self, model: PreTrainedModel, name: str, layer: SparseLinear) -> None:
        """Check the tensors of a layer, wherever they were loaded from."""
        checkpoint = self._checkpoint
        layer.check(f"{checkpoint.folder}: {name}", layer.parts)
        stored = self._stored_name(model, name)
        if checkpoint.file_entries and stored:
            # Offloaded parts will be loaded from the files by accelerate.
            if any(part.is_meta for part in layer.parts.values()):
                checkpoint.read([stored])
            return
        # A given state dict was not seen; transformers marks the tensors that it was loaded into.
        for tensor, value in layer.state_dict(keep_vars=True).items():
            if not getattr(value, "_is_hf_initialized", False):
                raise CheckpointError(f"{name}: the state dict lacks its {tensor}.")

    def _open(self, model: PreTrainedModel, files: list[str]) -> Checkpoint:
        """Read the headers of the files that transformers is about to load."""
        from prunekit.checkpoint.header import read_header
        from prunekit.checkpoint.reader import Checkpoint

        folder = Path(files[0]).parent if files else Path(model.name_or_path or "")
        packed = compressed_weights(folder, vars(self.quantization_config))
        entries = {}
        for file in files if packed else ():
            entries |= read_header(Path(file))
        return Checkpoint(folder, {}, {}, entries, packed)

    def _stored_name(self, model: PreTrainedModel, name: str) -> str | None:
        """Return the stored name of a module's compressed weight, or None.

        Names may differ by the base model prefix: a checkpoint can be saved with a head and loaded
        without it, or the other way round.
        """
        prefix = f"{model.base_model_prefix}."
        names = (name, prefix + name, name.removeprefix(prefix))
        known = (f"{each}.weight" for each in names)
        return next((each for each in known if each in self._checkpoint.compressed), None)

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


def _check_files(checkpoint: Checkpoint, name: str, module: nn.Module) -> None:
    """Check by headers that files hold all tensors of a layer.

    transformers would initialize a missing one instead.
    """
    checkpoint.compressed[name].check_entries(checkpoint.folder, name, checkpoint.file_entries)
    bias = f"{layer_name(name)}.bias"
    if module.bias is not None and bias not in checkpoint.file_entries:
        raise CheckpointError(f"{checkpoint.folder}: lacks {bias}, which belongs to {name}.")


def _check_layer(name: str, module: nn.Module, stored: WeightLayout) -> None:
    """Check that config.json and the model agree, before weights are loaded."""
    from prunekit.architectures.coverage import LINEAR_TYPES
    from prunekit.models.orientation import stored_transposed

    matches = type(module) in LINEAR_TYPES and stored_transposed(module) == stored.transposed
    if not matches or tuple(module.weight.shape) != stored.shape:  # pyright: ignore
        raise CheckpointError(
            f"config.json: {name} is listed as compressed from a linear layer whose weight has "
            f"shape {list(stored.shape)}, but the model has {module} there."
        )
