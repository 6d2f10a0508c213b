"""Vision blocks that stay loaded until the text has read their features."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from prunekit.models.sequential.weights import Weights


class KeptTowers:
    """Blocks of towers, pruned before the text.

    Args:
        weights: Source of the weights, or None when the model has them.

    Attributes:
        modules: The blocks that are loaded.
    """

    def __init__(self, weights: Weights | None) -> None:
        self._weights = weights
        self.modules: list[nn.Module] = []

    @contextmanager
    def loaded(self, module: nn.Module) -> Iterator[None]:
        """Load a block, which stays loaded."""
        if self._weights:
            self._weights.load(module)
        self.modules.append(module)
        yield

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Give the blocks the weights of the dense model for a ``with`` block.

        A model that has its weights itself keeps them.
        """
        children = {child for module in self.modules for child in module.modules()}
        pruned = {child: {**child._parameters} for child in children}
        if self._weights:
            for module in self.modules:
                self._weights.load(module)
        try:
            yield
        finally:
            for child, parameters in pruned.items():
                child._parameters.update(parameters)

    def drop(self) -> None:
        """Drop the weights of the blocks."""
        if self._weights:
            for module in self.modules:
                self._weights.drop(module)
        self.modules.clear()
