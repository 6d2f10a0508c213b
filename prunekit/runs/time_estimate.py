"""Estimated time of a run: operations divided by a measured speed.

Each kind of work is measured on the device of the run, on matrices of the model's shapes or of a
part of them, and scaled by the number of operations. Reading and writing files is left out.

Shapes: O output features, I input features, T tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit.formatting import duration
from prunekit.models.devices import synchronized_seconds

WIDEST = 1024
"""Maximum number of input and of output features of the measured layer."""
TOKENS = 1024
REPEATS = 3


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of a run on its slowest rank.

    Attributes:
        parts: Seconds of each kind of work.
    """

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds of the whole run, without files."""
        return sum(self.parts.values())

    def describe(self, blocks: int) -> str:
        """Return the estimate in words, for a model of ``blocks`` blocks."""
        listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.parts.items())
        return (
            f"about {duration(self.total)}, {duration(self.total / blocks)} a block, files apart: "
            f"{listed}"
        )


def measured_layer(
    outputs: int, inputs: int, device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "T I"], Float[Tensor, "O I"]]:
    """Return random inputs and weights of a layer, at most ``WIDEST``.

    Args:
        outputs: Output features of the layer.
        inputs: Its input features, halved while above ``WIDEST`` and divisible by 128: every
            pattern divides the result as it divides the original.
        device: Device of the run.
        dtype: Data type of the run.
    """
    while inputs > WIDEST and inputs % 128 == 0:
        inputs //= 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, inputs, generator=generator)
    weight = torch.randn(min(outputs, WIDEST), inputs, generator=generator)
    return x.to(device, dtype), weight.to(device, dtype)


def seconds_of_product(x: Float[Tensor, "T I"], weight: Float[Tensor, "O I"]) -> float:
    """Return the seconds of an operation in products of activations and weights."""
    flops = 2 * len(x) * weight.numel()
    return shortest_seconds(lambda: x @ weight.T, x.device) / flops


def shortest_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time of ``REPEATS`` calls, after one to warm up."""
    call()
    least = float("inf")
    for _ in range(REPEATS):
        began = synchronized_seconds(device)
        call()
        least = min(least, synchronized_seconds(device) - began)
    return least


def operations_text(parts: Mapping[str, float]) -> str:
    """Return operations of each kind of work in words."""
    return ", ".join(f"{name} {value / 1e12:.3g}" for name, value in parts.items()) + " TFLOP"
