"""Which calibration samples make the inputs of linears NaN or inf.

It is noted as the block runs: a GPU finds a fault later, when the block cannot be run again.

Shapes: B samples of a batch, I input features.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from prunekit.distributed.ranks import Ranks
from prunekit.models.layout import Linear
from prunekit.models.sequential.loaded_block import LoadedBlock


class FiniteSamples:
    """Which samples have finite inputs, noted as a block runs.

    Attributes:
        samples: Numbers of the samples of the batch that runs.
    """

    def __init__(self) -> None:
        self.samples = range(0)
        self._found: dict[str, list[Bool[Tensor, " B"]]] = {}

    def watch(
        self, loaded: LoadedBlock, stages: Sequence[Sequence[Linear]], stack: ExitStack
    ) -> None:
        """Note the inputs of stages from now on, until ``stack`` ends."""
        for path in {_source(linears[0]): None for linears in stages}:

            def note(_: nn.Module, inputs: tuple, path: str = path) -> None:
                self._found.setdefault(path, []).append(_finite_samples(inputs[0], self.samples))

            hook = loaded.module.get_submodule(path).register_forward_pre_hook(note)
            stack.callback(hook.remove)

    def explain(self, linear: Linear, ranks: Ranks) -> str:
        """Return which sample makes the input of a linear NaN or inf."""
        own = [each for batch in self._found.get(_source(linear), ()) for each in batch.tolist()]
        # Ranks hold consecutive samples.
        finite = [sample for samples in ranks.all_gather_object(own) for sample in samples]
        if False in finite:
            number = finite.index(False)
            return f"{linear.name}: its input is NaN or inf in calibration sample {number}."
        return f"{linear.name}: the squares of its inputs overflow float32."


def _source(linear: Linear) -> str:
    """Return the module whose input has the samples in order.

    An expert's tokens are of any sample; the input of all experts together is in order.
    """
    return linear.expert.rpartition(".")[0] if linear.expert else linear.path


def _finite_samples(x: Float[Tensor, "... I"], samples: range) -> Bool[Tensor, " B"]:
    """Return whether each sample of a batch is finite."""
    tokens = x.flatten(0, -2)
    # Towers of images may flatten patches of different numbers; then the batch is one.
    parts = len(samples) if len(tokens) % max(len(samples), 1) == 0 else 1
    largest = torch.linalg.vector_norm(tokens.reshape(parts, -1), ord=torch.inf, dim=1)
    return largest.isfinite().expand(len(samples))
