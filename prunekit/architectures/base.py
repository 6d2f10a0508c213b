"""Data classes that locate blocks, linears, heads and neurons in a model."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

Count = Literal["heads", "groups", "size", "width"]
"""Number of query heads, number of key heads, features per head, features of all query heads."""


@dataclass(frozen=True)
class Stage:
    """Linears of a block that share their input tensor.

    Names are relative to the block. ``*`` stands for the index of an expert, whose linears read
    the tokens routed to it. Fused experts are addressed as the linears ``gate_proj``, ``up_proj``
    and ``down_proj``.
    """

    linears: tuple[str, ...]

    def __init__(self, *linears: str) -> None:
        object.__setattr__(self, "linears", linears)

    @property
    def experts(self) -> str | None:
        """Name of the module that holds the experts, or None."""
        module, star, _ = self.linears[0].partition(".*.")
        return module if star else None

    def for_expert(self, expert: int) -> "Stage":
        """Return the stage of one expert, with ``*`` replaced by its index."""
        return Stage(*(linear.replace("*", str(expert)) for linear in self.linears))


@dataclass(frozen=True)
class Attention:
    """Locations of the heads of one attention module of a block.

    Linears are named relative to the block. If query, key and value share one linear, its outputs
    are all queries, then all keys, then all values; or, if ``interleaved``, the queries, the key
    and the value of each key head in turn.

    Attributes:
        module: Module that computes the attention.
        query: Linear whose outputs are the queries of all heads.
        key: Linear whose outputs are the keys; fewer heads with grouped queries.
        value: Linear whose outputs are the values.
        output: Linear that reads the concatenated head outputs.
        size: Attribute of ``module`` that holds the features per head.
        interleaved: Whether a shared query-key-value linear is ordered by key heads.
        counts: Attributes of ``module`` that hold head counts and must be updated when heads are
            removed; "config.x" is a config entry that the module reads at each call.
        entries: Entries of ``config.json`` that hold these counts for all blocks. Empty where the
            head size is the hidden size divided by the number of heads, since fewer heads cannot
            be expressed then.
        bias: Embedding below ``module`` of the first block with one column per head, which all
            blocks of the stack add to their attention scores; "" if they add zeros that the first
            block creates for its own number of heads; None without such a bias.
        emptiable: Whether ``module`` returns the output of ``output``, or of the heads if that
            linear is outside of it, then the position bias if the blocks share one, then the
            attention weights; so that an attention of which all heads are removed can do so too.
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
    emptiable: bool = True


@dataclass(frozen=True)
class FeedForward:
    """Locations of the neurons of a block.

    Linears are named relative to the block.

    Attributes:
        inputs: Linears whose outputs are the neurons: one, or a gate and an up projection. Names
            that a config does not have are ignored. A linear with twice as many outputs as neurons
            holds gate and up projection.
        output: Linear that reads the neurons.
        entry: Entry of ``config.json`` for the number of neurons.
    """

    inputs: tuple[str, ...]
    output: str
    entry: str = "intermediate_size"


@dataclass(frozen=True)
class Stack:
    """A list of equal blocks between initial and final hidden states.

    Attributes:
        blocks: Name of the ``ModuleList``, relative to ``model.base_model``.
        stages: Stages of one block in the order of the data flow.
        module: Module whose forward runs the stack, relative to ``model.base_model``; "" is the
            base model itself.
        reads: ``module`` of the stack whose final hidden states are cross-attended, if any.
        optional: Linears that only some configs of the family, or only some blocks, have.
        varied: Stages of each block where blocks differ; ``stages`` is empty then.
        dense: Linears that are never pruned, with the reason.
        reads_ids: The stack runs from token ids only, not from their embeddings.
        carries: A block reads the further outputs of the block before it, other ones in each batch.
        sample_axis: Dimension of the samples in the hidden states of a block; tokens are the next.
        features: The stack reads features of sound in place of tokens.
        tower: Width of the hidden states of a vision tower, which a forward of the whole model on
            an image runs; 0 for another stack.
        attentions: Locations of the heads of a block.
        feed_forwards: Locations of the neurons of a block.
        config: Entry of ``config.json`` with the entries of this stack, where a model has several
            parts, such as "text_config"; dots lead to one further inside.
        depth: Entry for the number of blocks.
        per_block: Entries with one value, or letter, per block, where present.
        block_numbers: Entries that list numbers of blocks, where present.
        by_block: Entries with something for some blocks, by number, where present.
    """

    blocks: str
    stages: tuple[Stage, ...]
    module: str = ""
    reads: str | None = None
    optional: frozenset[str] = frozenset()
    varied: tuple[tuple[Stage, ...], ...] = ()
    dense: tuple[tuple[str, str], ...] = ()
    reads_ids: bool = False
    carries: bool = False
    sample_axis: int = 0
    features: bool = False
    tower: int = 0
    attentions: tuple[Attention, ...] = ()
    feed_forwards: tuple[FeedForward, ...] = ()
    config: str = ""
    depth: str = "num_hidden_layers"
    per_block: tuple[str, ...] = (
        "layer_types",
        "layers_block_type",
        "hybrid_override_pattern",
        "mlp_layer_types",
        "no_rope_layers",
        "attn_type_list",
    )
    block_numbers: tuple[str, ...] = (
        "attn_layer_indices",
        "full_attn_idxs",
        "hybrid_layer_ids",
        "mlp_only_layers",
        "moe_layers",
    )
    by_block: tuple[str, ...] = ("per_layer_config",)

    @property
    def experts(self) -> list[str]:
        """Names of the modules of a block that hold experts."""
        stages = (stage for block in (self.stages, *self.varied) for stage in block)
        return list(dict.fromkeys(filter(None, (stage.experts for stage in stages))))

    def entry(self, name: str) -> str:
        """Return the full name of a config entry of this stack."""
        return f"{self.config}.{name}" if self.config else name

    def stages_of(self, index: int, modules: Iterable[str]) -> list[Stage]:
        """Return the stages of a block, with one copy per expert.

        A stage whose experts the block does not have is returned unchanged.

        Args:
            index: Number of the block in the stack.
            modules: Names of all modules of the block, relative to it.
        """
        declared = self.varied[index] if self.varied else self.stages
        numbers: dict[str, list[int]] = {}
        for name in modules:
            owner, _, number = name.rpartition(".")
            if owner in self.experts and number.isdigit():
                numbers.setdefault(owner, []).append(int(number))
        stages: list[Stage] = []
        for owner, group in groupby(declared, lambda stage: stage.experts):
            alike = list(group)
            if owner in numbers:
                stages += [
                    stage.for_expert(number) for number in sorted(numbers[owner]) for stage in alike
                ]
            else:
                stages += alike
        return stages

    def is_optional(self, linear: str) -> bool:
        """Return whether a block may be without this linear."""
        return linear in self.optional or re.sub(r"\.\d+\.", ".*.", linear) in self.optional

    def why_dense(self, linear: str) -> str | None:
        """Return why a linear of a block is never pruned, or None."""
        return dict(self.dense).get(linear)


@dataclass(frozen=True)
class Stream:
    """Conventions of a residual stream that is only read through RMSNorm modules.

    Attributes:
        epsilon: Entry of ``config.json`` that the norms add to the mean square.
        offset: Constant added to the norm weights before the multiplication.
        scaled: Whether the embeddings are multiplied by the square root of the width.
        divided: Entries of ``config.json``; the first one present says whether the final hidden
            states are divided by the square root of the width before the output head.
    """

    epsilon: str = "rms_norm_eps"
    offset: float = 0.0
    scaled: bool = False
    divided: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """A model family: the ``config.model_type`` values it covers and its stacks.

    Attributes:
        model_types: Values of ``config.model_type``.
        stacks: Stacks in execution order.
        probed: Whether it was found by probing instead of declared.
        stream: Residual stream conventions; None where its coordinates cannot be removed.
    """

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    probed: bool = False
    stream: Stream | None = None
