"""Faults in the tensors of a block, counted on its device."""

from collections.abc import Callable

from prunekit_kernels import Pending, to_host
from torch import Tensor


class Checks:
    """Counts that must be zero, and the errors where they are not.

    On a CPU such an error is raised at once. A GPU is not waited for: :meth:`settle` looks at the
    counts later, before anything that depends on them is written.
    """

    def __init__(self) -> None:
        self._open: list[tuple[Pending, Callable[[int], Exception]]] = []

    def require_none(self, faults: Tensor, error: Callable[[int], Exception]) -> None:
        """Require that there are no faults.

        Args:
            faults: Their count, or a bool, on its device.
            error: Makes the error, given the count.

        Raises:
            Exception: There are faults, as is known already.
        """
        known = to_host(faults)
        if isinstance(known, Pending):
            self._open.append((known, error))
        elif known:
            raise error(known)

    def hold(self) -> bool:
        """Wait for all counts and return whether they are zero."""
        held = not any(count.wait() for count, _ in self._open)
        if held:
            self._open = []  # errors refer to the block
        return held

    def settle(self) -> None:
        """Wait for all counts.

        Raises:
            Exception: The error of the first that is not zero.
        """
        waiting, self._open = self._open, []
        for count, error in waiting:
            if found := count.wait():
                raise error(found)
