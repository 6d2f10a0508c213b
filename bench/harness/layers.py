"""Shapes of real layers, outputs × inputs, and of real attention."""

from typing import NamedTuple

LINEAR = {
    "smollm2-135m.q_proj": (576, 576),
    "smollm2-135m.gate_proj": (1536, 576),
    "smollm2-135m.down_proj": (576, 1536),
    "llama2-7b.q_proj": (4096, 4096),
    "llama2-7b.gate_proj": (11008, 4096),
    "llama2-7b.down_proj": (4096, 11008),
    "llama3-8b.k_proj": (1024, 4096),
    "llama3-8b.down_proj": (4096, 14336),
    "qwen3-8b.gate_proj": (12288, 4096),
    "llama3-70b.q_proj": (8192, 8192),
    "llama3-70b.down_proj": (8192, 28672),
}
"""Outputs and inputs."""

SMALL = ("smollm2-135m.gate_proj", "smollm2-135m.down_proj")
"""Layers that a CPU finishes within a minute or two."""

LARGE = (
    "smollm2-135m.down_proj",
    "llama2-7b.q_proj",
    "llama2-7b.down_proj",
    "llama3-8b.down_proj",
    "qwen3-8b.gate_proj",
    "llama3-70b.down_proj",
)
"""Layers that a GPU is measured with."""


class Attention(NamedTuple):
    """A layer's attention: batch, heads, key heads, length, head dimension."""

    batch: int
    heads: int
    shared: int
    length: int
    size: int


ATTENTION = {
    "smollm2-135m": Attention(1, 9, 3, 1024, 64),
    "llama2-7b": Attention(1, 32, 32, 4096, 128),
    "llama3-8b": Attention(2, 32, 8, 4096, 128),
    "qwen3-8b": Attention(2, 32, 8, 2048, 128),
}


def linears(device_type: str) -> dict[str, tuple[int, int]]:
    """Return the linears for this kind of device."""
    return {name: LINEAR[name] for name in (LARGE if device_type == "cuda" else SMALL)}
