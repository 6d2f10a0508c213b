"""What pruning took from linears, given back by thin matrices: a LoRA adapter beside a checkpoint.

With E = W − W′ the weight that went and H = XᵀX of the inputs, the product BA of rank r for which
‖(E − BA)X‖² is least is B = U, A = UᵀE, where U are the first r eigenvectors of E H Eᵀ: those of
EoRA (Liu et al., arXiv:2410.21271), which goes through the eigenspace of H, without a square root
or an inverse of it.

Shapes: O output features, I input features, R rank.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunekit.checkpoint.atomic import write_atomically, write_shard

FOLDER = "adapter"
"""Folder of the adapter, within that of the checkpoint."""
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""What peft puts before the name of a module."""


@dataclass(frozen=True)
class Adapter:
    """The two factors of what is added to a linear: B, which peft calls lora_B, and A."""

    up: Float[Tensor, "O R"]
    down: Float[Tensor, "R I"]

    @property
    def product(self) -> Float[Tensor, "O I"]:
        """BA in float32."""
        return self.up.float() @ self.down.float()

    @torch.no_grad()
    def add_to(self, linear: nn.Module) -> None:
        """Add it to the weight of a linear, in place, as the linear's layer would in a forward."""
        weight = cast("Tensor", linear.weight)
        product = self.product.to(weight.device)
        weight.add_(product.T if isinstance(linear, Conv1D) else product)


def write_part(folder: Path, block: str, found: Mapping[str, Adapter]) -> None:
    """Write the adapters of a block, by the names of its linears; whole or not at all."""
    (folder / FOLDER).mkdir(exist_ok=True)
    write_shard(folder / FOLDER / f"{block}.safetensors", _named(found))


def read_part(folder: Path, block: str) -> dict[str, Adapter]:
    """Return the adapters of a block, by the names of its linears."""
    whole, part = folder / FOLDER / FILE, folder / FOLDER / f"{block}.safetensors"
    found = _adapters(load_file(part if part.is_file() else whole))
    return {name: adapter for name, adapter in found.items() if name.startswith(f"{block}.")}


def read(folder: Path) -> dict[str, Adapter]:
    """Return all adapters of a finished folder; none where it has none."""
    file = folder / FOLDER / FILE
    return _adapters(load_file(file)) if file.is_file() else {}


def finish(folder: Path, blocks: list[str], *, transposed: bool) -> None:
    """Make one adapter, which peft opens, of the parts of all blocks.

    ``transposed``: linears have their weights inputs first.
    """
    whole = folder / FOLDER / FILE
    if not whole.is_file():
        found = {}
        for block in blocks:
            found |= read_part(folder, block)
        write_shard(whole, _named(found))
    ranks = {name: len(adapter.down) for name, adapter in read(folder).items()}
    if not ranks:
        return
    largest = max(ranks.values())
    smaller = {name: rank for name, rank in ranks.items() if rank < largest}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(folder),
        "r": largest,
        "lora_alpha": largest,  # so that BA is added as it is
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    write_atomically(folder / FOLDER / CONFIG, json.dumps(config, indent=2).encode() + b"\n")
    for block in blocks:
        (folder / FOLDER / f"{block}.safetensors").unlink(missing_ok=True)


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
