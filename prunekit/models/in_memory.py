"""Requirements on models in memory, and weights sharded over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn
from transformers import PretrainedConfig

from prunekit.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def check_in_memory(model: object) -> None:
    """Refuse an object that is no transformers model with all its weights.

    Raises:
        ConfigError: It is something else, or some weights are on the meta device, offloaded or
            cannot be changed.
    """
    if not isinstance(model, nn.Module) or not isinstance(
        getattr(model, "config", None), PretrainedConfig
    ):
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        raise ConfigError(
            f"model: {kind} is not a transformers model. Pass the object that from_pretrained or "
            "prunekit.load returns."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ConfigError(
                f"model: {name} has no values in memory: the model is on the meta device, or "
                "accelerate has offloaded a part. Load all of it, without a device_map."
            )
        if tensor.is_inference():
            raise ConfigError(
                f"model: {name} was made under torch.inference_mode and cannot be changed. Load "
                "the model outside of it."
            )


def is_flattened(model: nn.Module) -> bool:
    """Return whether weights are parts of flat tensors (FSDP 1, ZeRO-3)."""
    from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel

    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(parameter, FlatParameter) or hasattr(parameter, "ds_id")
        for parameter in model.parameters()
    )


def is_sharded(model: nn.Module) -> bool:
    """Return whether each process has a part of the weights (FSDP, ZeRO-3)."""
    return is_flattened(model) or any(is_distributed(each) for each in model.parameters())


def is_distributed(value: Tensor) -> TypeGuard[DTensor]:
    """Return whether FSDP 2 shards a tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def whole_tensor(value: Tensor) -> Tensor:
    """Return a tensor without sharding by FSDP 2.

    All processes have to call it alike, as they exchange their parts.
    """
    return value.full_tensor() if is_distributed(value) else value


def check_unsharded(model: nn.Module) -> None:
    """Refuse a model whose weights are sharded over processes.

    Raises:
        ConfigError: It is sharded by FSDP or by DeepSpeed's ZeRO-3.
    """
    if is_sharded(model):
        raise ConfigError(
            "model: its weights are sharded over processes (FSDP or ZeRO-3), and a part cannot be "
            "pruned by itself. Use DDP, or prune before the model is sharded or after it is saved."
        )
