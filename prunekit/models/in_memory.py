"""Requirements on models in memory, and weights sharded over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard, cast

import torch
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
    if type(value) in {Tensor, nn.Parameter}:  # it is asked of each weight in each step
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def whole_tensor(value: Tensor) -> Tensor:
    """Return a tensor without sharding by FSDP 2.

    All processes have to call it alike, as they exchange their parts.
    """
    return value.full_tensor() if is_distributed(value) else value


def local_part(value: Tensor) -> Tensor:
    """Return this process's part of a tensor, or all of it."""
    return cast("DTensor", value.detach()).to_local() if is_distributed(value) else value


def sharded_like(part: Tensor, like: Tensor) -> Tensor:
    """Return a tensor of which this process has a part.

    Args:
        part: The part; returned as it is if ``like`` is not sharded.
        like: A tensor that is sharded in the same way. Its last axis may have another size.
    """
    if not is_distributed(like):
        return part
    from torch.distributed.tensor import DTensor

    shape = torch.Size([*like.shape[:-1], part.shape[-1]]) if like.ndim > 1 else like.shape
    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return those rows of a tensor that belong to this process.

    It has the same rows of ``like``, which is sharded.
    """
    if not is_distributed(like):
        return whole
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        like.shape, like.device_mesh, like.placements
    )
    return whole.narrow(0, offset[0], shape[0]) if shape[0] else whole[:0]


def summed_over_parts(number: int, like: Tensor) -> int:
    """Sum a number over the processes that have parts of a tensor."""
    if not is_distributed(like):
        return number
    from torch import distributed

    total = torch.tensor(number, device=like.device)
    distributed.all_reduce(total, group=like.device_mesh.get_group())
    return int(total)


def check_unflattened(model: nn.Module) -> None:
    """Refuse a model whose weights are parts of flat tensors.

    Raises:
        ConfigError: It is sharded by FSDP 1 or by DeepSpeed's ZeRO-3.
    """
    if is_flattened(model):
        raise ConfigError(
            "model: its weights are sharded over processes as parts of flat tensors (FSDP 1 or "
            "ZeRO-3), of which no rows can be told. Use FSDP 2 or DDP, or prune before the model "
            "is sharded or after it is saved."
        )
