"""Tensors that are computed from stored ones whenever they are read."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor


class TensorView(NamedTuple):
    """A tensor that is computed from a stored one.

    Attributes:
        stored: Name of the stored tensor.
        of: Returns the tensor for the stored one, which it leaves as it is.
    """

    stored: str
    of: Callable[[Tensor], Tensor]

    def then(self, change: Callable[[Tensor], Tensor]) -> "TensorView":
        """Return the view of a tensor that is computed from this one."""
        return TensorView(self.stored, lambda stored: change(self.of(stored)))


def stored_tensors(names: Iterable[str], views: Mapping[str, TensorView]) -> list[str]:
    """Return the stored tensors that are needed for some names, each once.

    Args:
        names: Names of views and of stored tensors.
        views: The views by name.
    """
    found = (views[name].stored if name in views else name for name in names)
    return list(dict.fromkeys(found))


def read_views(
    names: Iterable[str], views: Mapping[str, TensorView], stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return views and stored tensors, by name.

    Args:
        names: Names of views and of stored tensors.
        views: The views by name.
        stored: The tensors of :func:`stored_tensors`.
    """
    return {
        name: views[name].of(stored[views[name].stored]) if name in views else stored[name]
        for name in names
    }
