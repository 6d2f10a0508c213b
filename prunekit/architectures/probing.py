"""Infer blocks and stages of undeclared model types from one traced forward."""

from typing import NoReturn, cast

from torch import nn
from transformers import PreTrainedModel

from prunekit.architectures.base import Architecture, Attention, Stack, Stage
from prunekit.architectures.coverage import (
    ADVICE,
    LINEAR_TYPES,
    named_linears,
    refuse_unknown_experts,
)
from prunekit.architectures.expert_layout import fused_experts
from prunekit.architectures.forward_trace import (
    FORWARD_ERRORS,
    ForwardTrace,
    TensorIdentity,
    run_again,
    traced_forward,
)
from prunekit.architectures.probed_heads import find_attentions, remove_last_key_head
from prunekit.errors import CheckpointError

NEVER = "a forward never calls it as a module"
SHARED = "it shares its weight with another"
REPEATED = "it is called more than once in a forward"
ROUTER = "it chooses the experts"


def probe(model: PreTrainedModel) -> Architecture:
    """Return the architecture of ``model`` as observed in one forward.

    The blocks are the outermost ``ModuleList`` whose modules contain linears; of several, the one
    in the text backbone. Linears that read the same tensor form a stage; stages and their linears
    are in the order of the first call. Linears that some blocks do not have are optional. Linears
    that are not called exactly once, and those that choose experts, are left dense.

    Raises:
        CheckpointError: There is no such list or more than one, the model runs neither from
            embeddings nor from token ids, its blocks are called in another order than that of the
            list, or most of their weights are in tensors of an unknown layout.
    """
    base, kind = cast(PreTrainedModel, model.base_model), model.config.model_type
    blocks = _find_blocks(base, kind)
    refuse_unknown_experts(model, blocks)
    try:
        with traced_forward(base, blocks) as trace:
            # Sizes of a text backbone beside towers are nested in the config.
            alone = len(_block_lists(base)) == 1
            attentions = _attentions(trace, blocks) if alone else ()
    except FORWARD_ERRORS as error:
        reason = (
            "its forward runs neither from inputs_embeds nor from input_ids without reading "
            f"numbers ({error})"
        )
        raise CheckpointError(_message(kind, reason)) from error
    return Architecture((kind,), (_stack(base, blocks, trace, attentions, kind),), probed=True)


def _find_blocks(base: PreTrainedModel, kind: str) -> str:
    lists = _block_lists(base)
    if not lists:
        _refuse(kind, "no ModuleList was found whose modules contain linears")
    if len(lists) > 1 and not getattr(base.config, "is_encoder_decoder", False):
        lists = _of_text(base, lists)
    if len(lists) > 1:
        _refuse(kind, f"probing runs one list of blocks, this model has {', '.join(lists)}")
    return lists[0]


def _block_lists(base: nn.Module) -> list[str]:
    """Return the names of candidate block lists, without lists nested inside them."""
    names: list[str] = []
    for name, module in base.named_modules():
        inside = any(name.startswith(f"{other}.") for other in names)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            single = isinstance(module[0], LINEAR_TYPES)
            if not single and all(named_linears(child) or fused_experts(child) for child in module):
                names.append(name)
    return names


def _of_text(base: PreTrainedModel, lists: list[str]) -> list[str]:
    """Return the lists of blocks of the text backbone."""
    paths = {module: name for name, module in base.named_modules()}
    decoder = paths.get(base.get_decoder(), "")
    inside = [name for name in lists if name.startswith(f"{decoder}.")] if decoder else lists
    nearest = min((name.count(".") for name in inside), default=0)
    found = [name for name in inside if name.count(".") == nearest] or lists
    alike = [
        name
        for name in found
        if len({type(child) for child in base.get_submodule(name).children()}) == 1
    ]
    return alike if len(alike) == 1 else found


def _attentions(trace: ForwardTrace, blocks: str) -> tuple[Attention, ...]:
    """Return the attentions of a block.

    None are returned where blocks differ in them, where a linear is shared by query, key and value,
    where the model does not run after one key head was removed, or where it has experts, whose
    units are not known.
    """
    if trace.experts or trace.repeated:
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
    base: PreTrainedModel,
    blocks: str,
    trace: ForwardTrace,
    attentions: tuple[Attention, ...],
    kind: str,
) -> Stack:
    if trace.broken:
        _refuse(
            kind,
            f"its forward changes the hidden states before {blocks}.{trace.broken[0]}, outside of "
            "the blocks, or they are not [samples, tokens, features]",
        )
    dense = _dense(base, blocks, trace)
    per_block = _per_block(trace, blocks, dense, kind)
    if not any(per_block):
        _refuse(
            kind, f"of its blocks {blocks} no linear can be pruned: {'; '.join({*dense.values()})}"
        )
    alike = all(stages == per_block[0] for stages in per_block)
    everywhere = [{name for stage in stages for name in stage.linears} for stages in per_block]
    return Stack(
        blocks,
        per_block[0] if alike else (),
        optional=frozenset(set().union(*everywhere) - set.intersection(*everywhere)),
        varied=() if alike else per_block,
        dense=tuple(sorted(dense.items())),
        reads_ids=trace.reads_ids,
        attentions=attentions,
    )


def _dense(base: PreTrainedModel, blocks: str, trace: ForwardTrace) -> dict[str, str]:
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


def _per_block(
    trace: ForwardTrace, blocks: str, dense: dict[str, str], kind: str
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
        _refuse(kind, f"{blocks}.{never[0]} was never called in a forward")
    if order != sorted(order):
        _refuse(kind, f"the blocks {blocks} are not called in the order of their list: {order}")
    return tuple(tuple(Stage(*names) for names in group.values()) for group in groups)


def _refuse(kind: str, reason: str) -> NoReturn:
    raise CheckpointError(_message(kind, reason))


def _message(kind: str, reason: str) -> str:
    return f"Model type {kind!r} is not declared and cannot be probed: {reason}. {ADVICE}"
