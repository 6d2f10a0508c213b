"""Remarks on compressed weights in the log of the server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms import current_platform

from prunekit.formatting import size
from prunekit.inference.serving import convert_command

if TYPE_CHECKING:
    from prunekit.inference.vllm.quantization import SparseConfig

logger = init_logger("vllm.plugins.prunekit")  # vLLM shows only loggers below its own


def remark_on_cpu(config: SparseConfig) -> None:
    """Say what compressed weights cost on a CPU."""
    if current_platform.is_cpu():
        logger.warning_once(
            "prunekit: weights stay compressed in memory and are expanded at every product, which "
            "on a CPU is slower than a dense model. For speed: PRUNEKIT_EXPAND=1, or %s",
            convert_command(config.folder),
        )


def remark_expanded(config: SparseConfig) -> None:
    """Say what expanded weights take."""
    from vllm.config import get_current_vllm_config

    model = get_current_vllm_config().model_config
    count = sum(weight.layout.outputs * weight.layout.inputs for weight in config.weights.values())
    kinds = ", ".join(sorted({weight.format.name for weight in config.weights.values()}))
    logger.warning_once(
        "prunekit: %s weights are expanded while they are loaded: they take %s over all processes "
        "instead of %s, as much as a dense checkpoint.",
        kinds,
        size(count * model.dtype.itemsize),
        size(_stored_bytes(config, model.dtype.itemsize)),
    )


def _stored_bytes(config: SparseConfig, itemsize: int) -> int:
    import torch

    total = 0
    with torch.device("meta"):
        for weight in config.weights.values():
            for name, part in weight.format.empty(weight.layout, torch.float32).items():
                typed = name == weight.format.typed_by
                total += part.numel() * (itemsize if typed else part.itemsize)
    return total
