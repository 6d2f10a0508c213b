"""Linear layers of vLLM with compressed weights.

Shapes, of one process: O output features, of all fused layers; I input features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from prunekit_kernels import (
    Sparse24,
    from_fragments,
    has_fragments,
    sparse24_matmul,
    sparse24_mma,
    to_fragments,
)
from prunekit_kernels.sparse24_mma import runs_mma
from torch.nn import Parameter
from typing_extensions import override
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import ModelWeightParameter

from prunekit.checkpoint.compressed import CompressedWeight, check_parts
from prunekit.checkpoint.formats import Format, WeightLayout
from prunekit.errors import ShapeError
from prunekit.inference import speed_table
from prunekit.inference.serving import convert_command
from prunekit.inference.vllm.loading import Loader, PartLoader
from prunekit.inference.vllm.remarks import remark_expanded, remark_on_cpu

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunekit.inference.vllm.quantization import SparseConfig

Permutation = Callable[[Sparse24], Sparse24]
BITS = 8
"""Columns of one byte of keep bits."""


def linear_method(config: SparseConfig, prefix: str) -> LinearMethodBase:
    """Return how a linear layer of vLLM holds its weight.

    2:4 weights stay compressed. Rows of a bitmask have different lengths, which can be neither
    fused nor split, so these are expanded; so are 2:4 weights that are fused with dense ones.

    Args:
        config: The quantization config.
        prefix: Name of the layer in the model of vLLM.
    """
    weights = config.stored(prefix)
    kinds = {weight and weight.format.name for weight in weights.values()}
    if kinds == {None}:
        return UnquantizedLinearMethod()
    loader = PartLoader(config.folder, weights)
    if kinds == {"2:4"} and not config.expand:
        remark_on_cpu(config)
        return Sparse24LinearMethod(prefix, loader)
    remark_expanded(config)
    return ExpandedLinearMethod(loader)


@register_weight_loader_v2_supported_method
class Sparse24LinearMethod(LinearMethodBase):
    """Holds a 2:4 weight compressed and multiplies it so.

    After loading, parts are permuted into fragment order where the kernel wants that, in their own
    storage, so captured CUDA graphs and reloaded weights find them where they were.
    """

    def __init__(self, prefix: str, loader: PartLoader) -> None:
        self.prefix, self.loader = prefix, loader
        self.fragments, self.max_kernel_tokens = False, None

    @override
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if input_size_per_partition != input_size and input_size_per_partition % BITS:
            folder = self.loader.folder
            raise ShapeError(
                f"{folder}: {self.prefix}: --tensor-parallel-size splits its {input_size} inputs "
                f"into {input_size_per_partition}, and 2:4 weights are split in multiples of "
                f"{BITS}. Use fewer processes, or the dense checkpoint: {convert_command(folder)}"
            )
        layout = _layout(sum(output_partition_sizes), input_size_per_partition)
        parts = self._format.empty(layout, params_dtype)
        for name, part in parts.items():
            load = partial(self._load, layer, name, extra_weight_attrs["weight_loader"])
            parameter = ModelWeightParameter(
                data=part, input_dim=1, output_dim=0, weight_loader=load
            )
            layer.register_parameter(name, parameter)

    @property
    def _format(self) -> Format:
        return next(weight.format for weight in self.loader.weights.values() if weight)

    def _load(
        self,
        layer: nn.Module,
        part: str,
        loader: Loader,
        parameter: Parameter,
        tensor: Tensor,
        place: object = None,
    ) -> None:
        if self.fragments:  # loaded again
            self._permute(layer, from_fragments)
            self.fragments = False
        _, stored = self.loader.receive(part, tensor, place)
        loader(parameter, stored, *_given(place))

    @override
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check the loaded weight and choose its kernel.

        Raises:
            CheckpointError: It is incomplete or corrupt.
        """
        self.loader.check_complete()
        weight, keep = _parts(layer)
        outputs, inputs = len(weight), 2 * weight.shape[1]
        where = f"{self.loader.folder}: {self.prefix}"
        if not self.fragments:
            parts = {"weight": weight, "keep": keep}
            check_parts(self._format, where, parts, _layout(outputs, inputs))
        if not self.fragments and runs_mma(weight) and has_fragments(outputs, inputs, weight.dtype):
            self._permute(layer, to_fragments)
            self.fragments = True
        if weight.is_cuda:
            dtype = str(weight.dtype).removeprefix("torch.")
            key = speed_table.layer_key(self._format.name, dtype, outputs, inputs)
            choice = speed_table.look_up(torch.cuda.get_device_name(weight.device), key)
            self.max_kernel_tokens = choice and choice.max_kernel_tokens

    def _permute(self, layer: nn.Module, permuted: Permutation) -> None:
        """Change the order of the parts, in place."""
        parts = _parts(layer)
        for part, value in zip(parts, permuted(Sparse24(*parts)), strict=True):
            part.copy_(value)

    @override
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight, keep = _parts(layer)
        multiply = sparse24_mma if self.fragments else sparse24_matmul
        y = multiply(x.reshape(-1, x.shape[-1]), weight, keep, self.max_kernel_tokens)
        if bias is not None:
            y = y + bias
        return y.view(*x.shape[:-1], y.shape[-1])


@register_weight_loader_v2_supported_method
class ExpandedLinearMethod(UnquantizedLinearMethod):
    """Holds a weight dense; expands a compressed one while it loads."""

    def __init__(self, loader: PartLoader) -> None:
        super().__init__()
        self.loader = loader
        self.waiting: dict[str, dict[str, Tensor]] = {}

    @override
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        loader = extra_weight_attrs.pop("weight_loader")
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            weight_loader=partial(self._load, layer, "weight", loader),
            **extra_weight_attrs,
        )
        weight = next(filter(None, self.loader.weights.values()))
        with torch.device("meta"):
            parts = weight.format.empty(weight.layout, params_dtype)
        # vLLM hands a tensor to a parameter of its name; these hold nothing.
        for name, part in parts.items():
            if name != "weight":
                empty = Parameter(torch.empty(0, dtype=part.dtype), requires_grad=False)
                empty.weight_loader = partial(self._load, layer, name, loader)  # pyright: ignore
                layer.register_parameter(name, empty)

    def _load(
        self,
        layer: nn.Module,
        part: str,
        loader: Loader,
        _: Parameter,
        tensor: Tensor,
        place: object = None,
    ) -> None:
        name, stored = self.loader.receive(part, tensor, place)
        weight = self.loader.weights[name]
        parts = self.waiting.setdefault(name, {})
        parts[part] = stored
        if weight is None:
            dense = stored
        elif len(parts) == len(weight.parts):
            dense = self._expanded(name, weight, parts)
        else:
            return
        del self.waiting[name]
        loader(layer.weight, dense, *_given(place))

    def _expanded(self, name: str, weight: CompressedWeight, parts: dict[str, Tensor]) -> Tensor:
        check_parts(weight.format, f"{self.loader.folder}: {name}", parts, weight.layout)
        return weight.format.expand(parts, weight.layout.inputs)

    @override
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that the weight is complete.

        Raises:
            CheckpointError: It is not.
        """
        self.loader.check_complete()
        super().process_weights_after_loading(layer)


def _layout(outputs: int, inputs: int) -> WeightLayout:
    """Return the layout of a 2:4 weight, or of a part."""
    return WeightLayout(outputs, inputs, outputs * inputs // 2)


def _parts(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return cast("Tensor", layer.weight.data), cast("Tensor", layer.keep.data)


def _given(place: object) -> tuple[object, ...]:
    return () if place is None else (place,)
