"""Gemma: Llama with offset norm weights and scaled embeddings."""

from prunekit.architectures.base import Architecture, Stream
from prunekit.architectures.llama import LLAMA

GEMMA = Architecture(
    model_types=("gemma2", "gemma3_text"),
    stacks=LLAMA.stacks,
    stream=Stream(offset=1.0, scaled=True),
)
