"""LoRA adapter that approximates the pruned part of linears.

With E = W − W′ the pruned part of a weight and H = XXᵀ the Gram matrix of the inputs, the product
BA of rank r that minimizes ‖(E − BA)X‖² is B = U, A = UᵀE, where U are the first r eigenvectors of
E H Eᵀ. It is the solution of EoRA (Liu et al., arXiv:2410.21271), which projects into the
eigenspace of H, but needs no square root or inverse of H.

Shapes: O output features, I input features, R rank.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from prunekit.checkpoint.atomic import write_atomically
from prunekit.checkpoint.safetensors_writer import write_shard

FOLDER = "adapter"
"""Subfolder of the checkpoint that holds the adapter."""
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""Prefix that peft adds to module names."""


@dataclass(frozen=True)
class Adapter:
    """Low-rank update BA of a linear's weight.

    Attributes:
        up: B, which peft calls lora_B.
        down: A, which peft calls lora_A.
    """

    up: Float[Tensor, "O R"]
    down: Float[Tensor, "R I"]

    @property
    def product(self) -> Float[Tensor, "O I"]:
        """BA in float32."""
        return self.up.float() @ self.down.float()


def file_names(blocks: Iterable[str]) -> list[str]:
    """Return the names of all files that hold an adapter.

    Until the adapters of all blocks are merged, each block has a file of its own.
    """
    parts = [f"{block}.safetensors" for block in blocks]
    return [f"{FOLDER}/{name}" for name in (*parts, FILE, CONFIG) if parts]


def write_block(folder: Path, block: str, found: Mapping[str, Adapter]) -> Path:
    """Write the adapters of a block atomically and return their file.

    Args:
        folder: Folder of the checkpoint.
        block: Name of the block.
        found: Adapters by name of the linear.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    file = folder / FOLDER / f"{block}.safetensors"
    write_shard(file, _named(found))
    return file


def read_block(file: Path, block: str) -> dict[str, Adapter]:
    """Return the adapters of a block, by name of the linear.

    ``file`` is that of the block or the merged one.
    """
    adapters = _adapters(load_file(file))
    return {name: adapter for name, adapter in adapters.items() if name.startswith(f"{block}.")}


def is_beside(folder: Path) -> bool:
    """Return whether a finished folder has adapters beside its weights."""
    return (folder / FOLDER / FILE).is_file()


def read(folder: Path) -> dict[str, Adapter]:
    """Return all adapters of a finished folder by name; empty if none."""
    return _adapters(load_file(folder / FOLDER / FILE)) if is_beside(folder) else {}


def merge(folder: Path, blocks: Mapping[str, Path]) -> Path:
    """Merge the adapters of all blocks; return the file that peft opens.

    Args:
        folder: Folder of the checkpoint.
        blocks: File that holds the adapters of each block, by name of the block.
    """
    found: dict[str, Adapter] = {}
    for block, file in blocks.items():
        found |= read_block(file, block)
    whole = folder / FOLDER / FILE
    write_shard(whole, _named(found))
    return whole


def write_config(folder: Path, *, transposed: bool, task: str | None = None) -> None:
    """Write the config of the merged adapter, unless it is empty.

    Args:
        folder: Folder of the checkpoint.
        transposed: The model stores weights inputs first (Conv1D).
        task: Task of the model as peft calls it, such as CAUSAL_LM.
    """
    ranks = {name: len(adapter.down) for name, adapter in read(folder).items()}
    if not ranks:
        return
    largest = max(ranks.values())
    smaller = {name: rank for name, rank in ranks.items() if rank < largest}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(folder),
        "r": largest,
        "lora_alpha": largest,  # peft scales BA by lora_alpha / r, here 1
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        **({"task_type": task} if task else {}),
    }
    write_atomically(folder / FOLDER / CONFIG, json.dumps(config, indent=2).encode() + b"\n")


def _named(found: Mapping[str, Adapter]) -> dict[str, Tensor]:
    tensors = {}
    for name, adapter in found.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = adapter.down.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = adapter.up.contiguous()
    return tensors


def _adapters(tensors: Mapping[str, Tensor]) -> dict[str, Adapter]:
    ends = ".lora_A.weight", ".lora_B.weight"
    names = [key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])]
    return {
        name.removeprefix(PREFIX): Adapter(tensors[name + ends[1]], tensors[name + ends[0]])
        for name in names
    }
