"""Writes sparse weights as compressed-tensors 0.14.0 does.

``python -m tests.published.freeze_compressed_tensors``, from the root of the repository and with
compressed-tensors 0.14.0 installed, the last release that could. Nothing of prunekit is used. For
each type, ``dense`` has every way in which a group of four can hold two non-zeros or fewer, at each
place of a byte and in rows that end within one.
"""

import itertools
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from safetensors.torch import save_file
from torch import Tensor

FILE = Path(__file__).parent / "compressed_tensors.safetensors"
CONFIGS = {"two_four": Sparse24BitMaskConfig(), "bitmask": BitmaskConfig()}


def dense(dtype: torch.dtype) -> Tensor:
    """Return a weight [17, 44] of all group fillings, 17 times each."""
    fillings = [kept for kept in itertools.product((0, 1), repeat=4) if sum(kept) <= 2]
    places = torch.tensor(fillings * 17, dtype=torch.float32).view(17, 44)
    values = torch.randn(17, 44, generator=torch.Generator().manual_seed(0)) + 3
    return (values * places).to(dtype)


def main() -> None:
    """Write the file."""
    tensors = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        tensors[f"{name}.dense"] = dense(dtype)
        for layout, config in CONFIGS.items():
            compressor = BaseCompressor.load_from_registry(config.format, config=config)
            tensors |= compressor.compress({f"{name}.{layout}.weight": dense(dtype)})
    save_file(tensors, FILE)


if __name__ == "__main__":
    main()
