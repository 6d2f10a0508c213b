"""Infer blocks and stages of undeclared model types from one traced forward."""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from transformers import PreTrainedModel

from prunekit.architectures.base import Architecture, Attention, FeedForward, Stack, Stage
from prunekit.architectures.block_lists import (
    BlockList,
    config_part,
    find_block_lists,
    part_of_config,
    refuse,
)
from prunekit.architectures.coverage import named_linears, refuse_unknown_experts
from prunekit.architectures.expert_layout import is_list
from prunekit.architectures.features import reads_features
from prunekit.architectures.forward_trace import (
    FORWARD_ERRORS,
    ForwardTrace,
    run_again,
    traced_forward,
)
from prunekit.architectures.origins import TensorIdentity
from prunekit.architectures.probed_feed_forwards import (
    find_entry,
    find_feed_forwards,
    remove_last_neuron,
)
from prunekit.architectures.probed_heads import find_attentions, remove_last_key_head

NEVER = "a forward never calls it as a module"
SHARED = "it shares its weight with another"
REPEATED = "it is called more than once in a forward"
ROUTER = "it chooses the experts"


def probe(model: PreTrainedModel) -> Architecture:
    """Return the architecture of ``model`` as observed in one forward.

    Linears that read the same tensor form a stage; stages and their linears are in the order of
    the first call. Linears that some blocks do not have are optional. Linears that are not called
    exactly once, and those that choose experts, are left dense.

    Raises:
        CheckpointError: There is no such list or more than one, the model runs neither from
            embeddings nor from token ids, its blocks are called in another order than that of the
            list, or most of their weights are in tensors of an unknown layout.
    """
    base = cast(PreTrainedModel, model.base_model)
    stacks: list[Stack] = []
    encoded = None
    for found in find_block_lists(base):
        refuse_unknown_experts(model, found.blocks)
        try:
            with traced_forward(base, found, encoded) as trace:
                dense = dense_linears(base, found.blocks, trace)
                part = part_of_config(trace.model, found.blocks)
                neurons = _feed_forwards(trace, found, dense, part)
                attentions = _attentions(trace, found.blocks)
        except FORWARD_ERRORS as error:
            reason = (
                "its forward runs neither from inputs_embeds nor from input_ids without reading "
                f"numbers ({error})"
            )
            refuse(base, reason)
        stack = _stack(base, found, trace, dense)
        units = {"attentions": attentions, "feed_forwards": neurons}
        stacks.append(replace(stack, config=part, **units))
        encoded = trace.features
    return Architecture((model.config.model_type,), tuple(stacks), probed=True)


def _feed_forwards(
    trace: ForwardTrace, place: BlockList, dense: Mapping[str, str], part: str
) -> tuple[FeedForward, ...]:
    """Return the feed-forwards of the blocks, outside of experts.

    None are returned where the model does not run after one neuron was removed from each.
    """
    fake, blocks, stack = trace.model, place.blocks, place.module.rpartition(".")[2]
    lists = (name for name, module in fake.named_modules() if is_list(module))
    indices = (index for index, _ in fake.get_submodule(blocks).named_children())
    left = (f"{blocks}.{index}.{path}" for index in indices for path in dense)
    found = find_feed_forwards(fake, blocks, trace.pointwise, (*trace.experts, *lists, *left))
    before = [*remove_last_neuron(fake.get_submodule(blocks), found)]
    try:
        run_again(trace)
    except FORWARD_ERRORS:
        return ()
    finally:
        for linear, name, value in before:
            setattr(linear, name, value)
    config = config_part(fake.config, part)
    return tuple(
        replace(each, entry=find_entry(config, width, stack)) for each, width in found.items()
    )


def _attentions(trace: ForwardTrace, blocks: str) -> tuple[Attention, ...]:
    """Return the attentions of a block.

    None are returned where blocks differ in them, or where the model does not run after one key
    head was removed.
    """
    if trace.repeated:
        return ()
    fake = trace.model
    found = find_attentions(fake, blocks, trace.attention, trace.reads)
    try:
        if found and remove_last_key_head(fake, blocks, found):
            run_again(trace)
    except FORWARD_ERRORS:
        return ()
    return found


def _stack(
    base: PreTrainedModel, found: BlockList, trace: ForwardTrace, dense: dict[str, str]
) -> Stack:
    blocks = found.blocks
    chain = trace.chain
    if chain.broken:
        refuse(
            base,
            f"its forward changes the hidden states before {blocks}.{chain.broken[0]}, outside of "
            "the blocks, or samples and tokens are not neighbouring dimensions of them, or that "
            "block reads outputs of earlier ones besides",
        )
    per_block = stages_per_block(base, trace, blocks, dense)
    if not any(per_block):
        refuse(
            base, f"of its blocks {blocks} no linear can be pruned: {'; '.join({*dense.values()})}"
        )
    alike = all(stages == per_block[0] for stages in per_block)
    everywhere = [{name for stage in stages for name in stage.linears} for stages in per_block]
    return Stack(
        blocks,
        per_block[0] if alike else (),
        module=found.module,
        reads=found.reads,
        optional=frozenset(set().union(*everywhere) - set.intersection(*everywhere)),
        varied=() if alike else per_block,
        dense=tuple(sorted(dense.items())),
        reads_ids=trace.reads_ids,
        sample_axis=chain.sample_axis,
        carries=chain.carries,
        features=reads_features(trace.stack),
        depth=found.depth,
    )


def dense_linears(base: PreTrainedModel, blocks: str, trace: ForwardTrace) -> dict[str, str]:
    """Return a block's linears that are not pruned, with reasons."""
    dense: dict[str, str] = {}
    tied: dict[str, str] = getattr(base, "all_tied_weights_keys", {})
    shared = {*tied, *tied.values()}
    for index, block in base.get_submodule(blocks).named_children():
        for path in named_linears(block):
            name = f"{blocks}.{index}.{path}"
            inside = any(name.startswith(f"{experts}.") for experts in trace.experts)
            if f"{name}.weight" in trace.routers:
                dense[path] = ROUTER
            elif f"{name}.weight" in shared:
                dense[path] = SHARED
            elif name in trace.repeated:
                dense[path] = REPEATED
            elif name not in trace.reads and not inside:
                dense.setdefault(path, NEVER)
    return dense


def stages_per_block(
    base: PreTrainedModel, trace: ForwardTrace, blocks: str, dense: dict[str, str]
) -> tuple[tuple[Stage, ...], ...]:
    """Group the linears of each block by the identity of their input."""
    count = len(list(trace.model.get_submodule(blocks).children()))
    groups: list[dict[TensorIdentity, list[str]]] = [{} for _ in range(count)]
    order: list[int] = []
    for name, read in trace.reads.items():
        if not name.startswith(f"{blocks}."):
            continue
        index, path = name.removeprefix(f"{blocks}.").split(".", 1)
        order += [int(index)] if int(index) not in order else []
        if name in trace.experts:
            for linears in trace.experts[name].stages(path):
                groups[int(index)][linears] = [*linears]
        elif path not in dense:
            groups[int(index)].setdefault(read, []).append(path)
    if never := sorted(set(range(count)) - {*order}):
        refuse(base, f"{blocks}.{never[0]} was never called in a forward")
    if order != sorted(order):
        refuse(base, f"the blocks {blocks} are not called in the order of their list: {order}")
    return tuple(tuple(Stage(*names) for names in group.values()) for group in groups)
