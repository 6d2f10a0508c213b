"""Origins of tensors in a traced forward, and inputs of its blocks.

Shapes: T tokens, D features.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from prunekit.architectures.attention_trace import storage_id

TOKENS = 4
EMBEDDINGS, BLOCKS = "inputs_embeds", "blocks"
"""Origins of tensors computed from the embeddings, and from hidden states of blocks."""
SHAPE_ONLY = ("_like", "new_")
"""Parts of the names of operations that read the shape of a tensor alone."""

TensorIdentity = tuple[object, ...]


def identity(x: Tensor) -> TensorIdentity:
    """Return a key that is equal for views of the same data.

    The batch has one sample, so merging the batch and token dimensions changes nothing. The version
    distinguishes a tensor from itself after an in-place operation.
    """
    rows = x.squeeze()
    storage = rows.untyped_storage()._cdata, rows.storage_offset()
    return *storage, rows.shape, rows.stride(), rows._version


class Origins(TorchDispatchMode):
    """Notes on each tensor which weights were multiplied for it last.

    And whether it was computed from embeddings or from outputs of blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {
            storage_id(weight): name for name, weight in model.named_parameters() if weight.ndim > 1
        }

    @override
    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [*tensors((args, kwargs))]
        own = {self._weights.get(storage_id(each)) for each in inputs} - {None}
        before = set().union(*map(origins, inputs))
        found = (own or before) | (before & {EMBEDDINGS, BLOCKS})
        if any(part in func.overloadpacket.__name__ for part in SHAPE_ONLY):
            found = set()
        for each in tensors(output):
            mark(each, found)
        return output


class BlockChain:
    """Inputs of the blocks of a list, noted by hooks.

    Attributes:
        embedded: Blocks that read the embeddings beside the hidden states.
        broken: Blocks whose input is not the output of the block before, or is not [..., 1, T, D]
            or [1, T, ..., D], or that read outputs of earlier blocks as arguments.
        carries: A block reads further outputs of the block before it.
        sample_axis: Dimension of the samples in the hidden states.
    """

    def __init__(self, blocks: nn.Module) -> None:
        self.embedded: set[str] = set()
        self.broken: list[str] = []
        self.carries = False
        self.sample_axis = 0
        self._output: Any = None
        self._further: set[TensorIdentity] = set()
        self._kept: list[Any] = []  # a later tensor could reuse the identity of a freed one
        self._handles = [
            handle
            for name, block in blocks.named_children()
            for handle in (
                block.register_forward_pre_hook(partial(self._before, name), with_kwargs=True),
                block.register_forward_hook(self._after),
            )
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _before(
        self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        others = dict(kwargs)
        hidden: Any = args[0] if args else others.pop("hidden_states", None)
        shape = hidden.shape[:-1] if isinstance(hidden, Tensor) else ()
        axes = [axis for axis in range(len(shape)) if shape[axis : axis + 2] == (1, TOKENS)]
        if not axes:
            self.broken.append(name)
            return None
        self.sample_axis = axes[0]
        first = self._output is None
        if not (first or identity(self._output) == identity(hidden)):
            self.broken.append(name)
        for each in tensors((args[1:], others)):
            if BLOCKS in origins(each):
                known = identity(each) in self._further
                self.carries |= known
                self.broken += [] if known else [name]
            elif EMBEDDINGS in origins(each):
                self.embedded.add(name)
        if not first:
            return None
        # An alias: the tensor itself may be an argument of later blocks too.
        alias = hidden.detach()
        mark(alias, {*origins(hidden), BLOCKS})
        return ((alias, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": alias})

    def _after(self, _: nn.Module, __: tuple[Any, ...], result: Any) -> None:  # noqa: ANN401
        self._output, *rest = result if isinstance(result, tuple | list) else (result,)
        self._kept.append(result)
        self._further = {identity(each) for each in tensors(rest)}
        mark(self._output, {*origins(self._output), BLOCKS})


def tensors(tree: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """Return all tensors among nested arguments."""
    return (each for each in tree_leaves(tree) if isinstance(each, Tensor))


def mark(x: Any, origins: set[Any]) -> None:  # noqa: ANN401
    """Note the origins of a tensor on it."""
    x.origins = origins


def origins(x: Tensor) -> set[str]:
    """Return the noted origins of a tensor."""
    return x.__dict__.get("origins", set())
