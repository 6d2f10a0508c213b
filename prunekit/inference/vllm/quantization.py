"""Quantization config of vLLM for checkpoints that prunekit compressed.

It is imported in every process of vLLM, so it imports no other module of prunekit at module level.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

if TYPE_CHECKING:
    from torch import nn
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.models.utils import WeightsMapper

    from prunekit.checkpoint.compressed import CompressedWeight

METHOD = "prunekit"
"""``quant_method`` of the checkpoints; a test holds it to that of the formats."""


class SparseConfig(QuantizationConfig):
    """The ``quantization_config`` of ``config.json``; see :mod:`prunekit.checkpoint.compressed`.

    Attributes:
        weights: Compressed weights by the name of their layer, as vLLM names it.
        expand: Whether weights are expanded while they are loaded.
        folder: The checkpoint, for messages and commands in them.
    """

    def __init__(self, weights: dict[str, CompressedWeight], *, expand: bool) -> None:
        super().__init__()
        self.weights, self.expand, self.folder = weights, expand, Path("DIR")

    @override
    def get_name(self) -> str:  # pyright: ignore  a plug-in's name is not one of the literals
        return METHOD

    @override
    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    @override
    def get_min_capability(cls) -> int:
        return 75  # Turing: the oldest for which vLLM and Triton have tensor-core products

    @staticmethod
    @override
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    @override
    def from_config(cls, config: dict[str, Any]) -> SparseConfig:
        """Read the entry of ``config.json``.

        Raises:
            CheckpointError: The entry is invalid.
        """
        from prunekit.checkpoint.compressed import compressed_weights, expands, layer_name

        weights = compressed_weights(Path(), config)
        named = {layer_name(name): weight for name, weight in weights.items()}
        return cls(named, expand=expands())

    @override
    def maybe_update_config(
        self, model_name: str, hf_config: object = None, revision: str | None = None
    ) -> None:
        """Check the checkpoint by its headers, before vLLM allocates anything.

        Raises:
            CheckpointError: It is incomplete, corrupt, or of a kind that vLLM cannot hold.
        """
        from prunekit.checkpoint.hub import checkpoint_folder
        from prunekit.inference.serving import check_servable

        self.folder = checkpoint_folder(model_name, revision)
        check_servable(self.folder)

    @override
    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        named = {f"{layer}.weight": weight for layer, weight in self.weights.items()}
        mapped = hf_to_vllm_mapper.apply_dict(named)
        self.weights = {name.removesuffix(".weight"): weight for name, weight in mapped.items()}

    @override
    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how a layer holds its weight.

        Args:
            layer: The layer, before it has weights.
            prefix: Its name in the model; that of a fused layer stands for those fused in it.

        Raises:
            CheckpointError: The layer is compressed but is none that can be served so.
        """
        from vllm.model_executor.layers.linear import LinearBase

        from prunekit.inference.vllm.layers import linear_method

        if isinstance(layer, LinearBase):
            return linear_method(self, prefix)
        self._check_dense(layer, prefix)
        return None

    def _check_dense(self, layer: nn.Module, prefix: str) -> None:
        from prunekit.errors import CheckpointError
        from prunekit.inference.serving import convert_command

        below = f"{prefix}."
        for name in self.weights:
            if prefix and (name == prefix or name.startswith(below)):
                raise CheckpointError(
                    f"{self.folder}: {name} is compressed, and {type(layer).__name__} of vLLM has "
                    f"no such layers. Serve the dense checkpoint: {convert_command(self.folder)}"
                )

    def stored(self, prefix: str) -> dict[str, CompressedWeight | None]:
        """Return the weights of a layer of vLLM, in its order.

        None: it is stored dense.

        Args:
            prefix: Name of the layer in the model of vLLM.
        """
        parent, dot, leaf = prefix.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{parent}{dot}{each}" for each in leaves]
        return {name: self._find(name) for name in names}

    def _find(self, name: str) -> CompressedWeight | None:
        """Return a weight by layer name.

        A checkpoint may have been saved without the prefix of the base model, or with one.
        """
        _, _, without = name.partition(".")
        for each in (name, without):
            if each in self.weights:
                return self.weights[each]
        ends = (key for key in self.weights if key.partition(".")[2] == name)
        return self.weights[key] if (key := next(ends, None)) else None
