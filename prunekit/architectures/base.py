"""Where a model family keeps its blocks and linears: data only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Linears of a block that read the same tensor; named relative to the block."""

    linears: tuple[str, ...]

    def __init__(self, *linears: str) -> None:
        object.__setattr__(self, "linears", linears)


@dataclass(frozen=True)
class Stack:
    """A list of equal blocks that runs from a first hidden state to a last one.

    Attributes:
        blocks: The ``ModuleList``, relative to ``model.base_model``.
        stages: Stages of one block in the order in which data flows through them.
        module: What is called to run the stack, relative to ``model.base_model``; "" is itself.
        reads: The ``module`` of the stack whose last hidden state is cross-attended, if any.
        optional: Linears that only some configs of the family have.
    """

    blocks: str
    stages: tuple[Stage, ...]
    module: str = ""
    reads: str | None = None
    optional: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Architecture:
    """A model family: which ``config.model_type`` values it covers and its stacks, in run order."""

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    probed: bool = False
