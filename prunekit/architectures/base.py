"""Where a model family keeps its blocks, linears, heads and neurons: data only."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

Count = Literal["heads", "groups", "size", "width"]
"""Query heads, key heads, features of a head, features of all query heads."""


@dataclass(frozen=True)
class Stage:
    """Linears of a block that read the same tensor; named relative to the block.

    ``*`` stands for the number of an expert: those of each read the tokens that it is given. Fused
    experts have the linears ``gate_proj``, ``up_proj`` and ``down_proj`` for this.
    """

    linears: tuple[str, ...]

    def __init__(self, *linears: str) -> None:
        object.__setattr__(self, "linears", linears)

    @property
    def experts(self) -> str | None:
        """The module whose experts it is about, if it is about experts."""
        module, star, _ = self.linears[0].partition(".*.")
        return module if star else None

    def of(self, expert: int) -> "Stage":
        """Return the stage of one expert."""
        return Stage(*(linear.replace("*", str(expert)) for linear in self.linears))


@dataclass(frozen=True)
class Attention:
    """Where the heads of one attention of a block live; linears are named relative to the block.

    Where query, key and value are one linear, its outputs are all queries, then all keys, then all
    values, or, if ``interleaved``, query, key and value of each head in turn.

    Attributes:
        module: What computes the attention.
        query: Linear whose outputs are the queries of all heads.
        key: The same of the keys; under grouped queries it has fewer heads.
        value: The same of the values.
        output: Linear that reads what the heads give.
        size: Attribute of ``module``: features of one head.
        interleaved: See above.
        counts: Attributes of ``module`` that have to say how many heads there are; "config.x" is an
            entry of a config that is read at each call.
        entries: Entries of ``config.json`` that say it of all blocks; none where a head's size is
            the hidden size divided by the heads, so that fewer heads cannot be said.
        bias: Embedding below ``module`` of the first block with a column a head, which all blocks
            of the stack add to their scores; "" if they add zeros that the first block makes, for
            as many heads as it has.
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    size: str = "head_dim"
    interleaved: bool = False
    counts: tuple[tuple[str, Count], ...] = ()
    entries: tuple[tuple[str, Count], ...] = ()
    bias: str | None = None


@dataclass(frozen=True)
class FeedForward:
    """Where the neurons of a block live; linears are named relative to the block.

    Attributes:
        inputs: Linears that write the neurons: one, or a gate and one; of those that only some
            configs have, the ones that are there. A linear with twice as many outputs holds both.
        output: Linear that reads the neurons.
        entry: Entry of ``config.json`` for the number of neurons.
    """

    inputs: tuple[str, ...]
    output: str
    entry: str = "intermediate_size"


@dataclass(frozen=True)
class Stack:
    """A list of equal blocks that runs from a first hidden state to a last one.

    Attributes:
        blocks: The ``ModuleList``, relative to ``model.base_model``.
        stages: Stages of one block in the order in which data flows through them.
        module: What is called to run the stack, relative to ``model.base_model``; "" is itself.
        reads: The ``module`` of the stack whose last hidden state is cross-attended, if any.
        optional: Linears that only some configs of the family, or some of its blocks, have.
        attentions: Where the heads of a block are.
        feed_forwards: Where the neurons of a block are.
        depth: Entry of ``config.json`` for the number of blocks, as most families call it.
        per_block: Entries with a value for each block, where a config has them.
    """

    blocks: str
    stages: tuple[Stage, ...]
    module: str = ""
    reads: str | None = None
    optional: frozenset[str] = frozenset()
    attentions: tuple[Attention, ...] = ()
    feed_forwards: tuple[FeedForward, ...] = ()
    depth: str = "num_hidden_layers"
    per_block: tuple[str, ...] = ("layer_types", "mlp_layer_types", "no_rope_layers")

    @property
    def experts(self) -> list[str]:
        """The modules of a block that hold experts."""
        return list(dict.fromkeys(filter(None, (stage.experts for stage in self.stages))))

    def stages_of(self, modules: Iterable[str]) -> list[Stage]:
        """Return the stages of a block with these modules: of experts, those of one after another.

        A stage about experts that the block does not have stays as it is.
        """
        numbers: dict[str, list[int]] = {}
        for name in modules:
            owner, _, number = name.rpartition(".")
            if owner in self.experts and number.isdigit():
                numbers.setdefault(owner, []).append(int(number))
        stages: list[Stage] = []
        for owner, group in groupby(self.stages, lambda stage: stage.experts):
            alike = list(group)
            if owner in numbers:
                stages += [stage.of(number) for number in sorted(numbers[owner]) for stage in alike]
            else:
                stages += alike
        return stages

    def may_lack(self, linear: str) -> bool:
        """Say whether a block need not have a linear."""
        return linear in self.optional or re.sub(r"\.\d+\.", ".*.", linear) in self.optional


@dataclass(frozen=True)
class Stream:
    """How a family treats the residual stream, whose every reader is an RMSNorm.

    Attributes:
        epsilon: Entry of ``config.json`` that its norms add to the mean square.
        offset: What its norms add to their weights before they multiply with them.
        scaled: The embeddings are multiplied by the root of the width.
        divided: Entries of which the first that a config has says whether the last hidden state is
            divided by the root of the width before the head reads it.
    """

    epsilon: str = "rms_norm_eps"
    offset: float = 0.0
    scaled: bool = False
    divided: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """A model family: which ``config.model_type`` values it covers and its stacks, in run order.

    ``stream`` is None where coordinates of the residual stream cannot be taken out.
    """

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    probed: bool = False
    stream: Stream | None = None
