"""Infer blocks and stages of undeclared model types from one traced forward.

The forward runs on a copy of the model with fake tensors, which have shapes and identity but no
data and no memory, so a model of any size is probed in seconds. (The meta device is not enough:
there transformers reads mask values unless it knows that it is traced.)
"""

import copy
import logging
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import NoReturn, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from prunekit.architectures.base import Architecture, Attention, Stack, Stage
from prunekit.architectures.coverage import (
    ADVICE,
    LINEAR_TYPES,
    base_model_prefix,
    named_linears,
    refuse_fused_experts,
)
from prunekit.architectures.probed_heads import (
    AttentionTrace,
    find_attentions,
    remove_last_key_head,
    storage_id,
    trace_attention,
)
from prunekit.errors import CheckpointError

# Raised by a forward that needs the values of fake tensors, or by a model that cannot run from
# embeddings alone.
FORWARD_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)

TensorIdentity = tuple[object, ...]


def probe(model: PreTrainedModel) -> Architecture:
    """Return the architecture of ``model`` as observed in one forward.

    The blocks are the only ``ModuleList`` whose modules have one class and contain linears. Linears
    that read the same tensor form a stage; stages and their linears are in the order of the first
    call. Linears that only some blocks have are optional.

    Raises:
        CheckpointError: There is no such list or more than one, the model does not run from
            embeddings, or its linears are not each called exactly once, block after block.
    """
    base, kind = cast(PreTrainedModel, model.base_model), model.config.model_type
    lists = _block_lists(base)
    if not lists:
        _refuse(kind, "no ModuleList was found whose modules are of one class and contain linears")
    if len(lists) > 1:
        _refuse(kind, f"probing runs one list of blocks, this model has {', '.join(lists)}")
    (blocks,) = lists
    refuse_fused_experts(model, blocks)
    reads, attentions = _trace_inputs(base, kind, blocks)
    for linear in named_linears(base.get_submodule(blocks)):
        if f"{blocks}.{linear}" not in reads:
            _refuse(
                kind, f"{base_model_prefix(model)}{blocks}.{linear} was never called in a forward"
            )
    stages, optional = _merge(_per_block(reads, blocks, kind), kind)
    stack = Stack(blocks, stages, optional=optional, attentions=attentions)
    return Architecture((kind,), (stack,), probed=True)


def _block_lists(base: nn.Module) -> list[str]:
    """Return the names of candidate block lists, without lists nested inside them."""
    names: list[str] = []
    for name, module in base.named_modules():
        inside = any(name.startswith(f"{other}.") for other in names)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            alike = len({type(child) for child in module}) == 1 and not isinstance(
                module[0], LINEAR_TYPES
            )
            if alike and all(named_linears(child) for child in module):
                names.append(name)
    return names


def _trace_inputs(
    base: PreTrainedModel, kind: str, blocks: str
) -> tuple[dict[str, TensorIdentity], tuple[Attention, ...]]:
    """Return the input identity of each linear, and the attentions.

    Identities are in call order; equal ones mean the same tensor. No attentions are returned where
    blocks differ in them, where a linear is shared by query, key and value, or where the model does
    not run after one key head was removed.
    """
    reads: dict[str, TensorIdentity] = {}
    kept: list[Tensor] = []

    def record_into(name: str, trace: AttentionTrace) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name in reads:
                _refuse(kind, f"{name} is called more than once in a forward")
            reads[name] = _identity(inputs[0])
            trace.reads[name], trace.writes[name] = storage_id(inputs[0]), storage_id(output)
            # Keep tensors alive: a later tensor could reuse the identity of a freed one.
            kept.extend([inputs[0], output])

        return hook

    config = copy.deepcopy(base.config)
    with torch.inference_mode(mode=False), torch.no_grad(), FakeTensorMode():
        try:
            with no_init_weights(), trace_attention(type(base), config) as trace:
                fake = type(base)(config).eval()
                handles = [
                    linear.register_forward_hook(record_into(name, trace))
                    for name, linear in named_linears(fake).items()
                ]
                _run(fake)
        except FORWARD_ERRORS as error:
            reason = (
                f"its forward does not run from inputs_embeds without reading numbers ({error})"
            )
            raise CheckpointError(_message(kind, reason)) from error
        found = find_attentions(fake, blocks, trace, reads)
        for handle in handles:
            handle.remove()
        try:
            if found and remove_last_key_head(fake, blocks, found):
                with trace_attention(type(base), config):
                    _run(fake)
        except FORWARD_ERRORS:
            found = ()
    return reads, found


def _run(fake: PreTrainedModel) -> None:
    # A failing forward is an expected outcome here; torch would log a page about it.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        _forward(fake)
    finally:
        log.disabled = before


def _forward(fake: PreTrainedModel) -> None:
    width = next(fake.get_input_embeddings().parameters()).shape[1]
    fake(inputs_embeds=torch.empty(1, 4, width), use_cache=False)


def _identity(x: Tensor) -> TensorIdentity:
    """Return a key that is equal for views of the same data.

    The batch has one sample, so merging the batch and token dimensions changes nothing. The version
    distinguishes a tensor from itself after an in-place operation.
    """
    rows = x.squeeze()
    storage = rows.untyped_storage()._cdata, rows.storage_offset()
    return *storage, rows.shape, rows.stride(), rows._version


def _per_block(reads: dict[str, TensorIdentity], blocks: str, kind: str) -> list[list[Stage]]:
    """Group the linears of each block by the identity of their input."""
    groups: dict[str, dict[TensorIdentity, list[str]]] = {}
    for name, read in reads.items():
        if name.startswith(f"{blocks}."):
            index, linear = name.removeprefix(f"{blocks}.").split(".", 1)
            groups.setdefault(index, {}).setdefault(read, []).append(linear)
    order = [int(index) for index in groups]
    if order != sorted(order):
        _refuse(kind, f"the blocks {blocks} are not called in the order of their list: {order}")
    return [[Stage(*names) for names in group.values()] for group in groups.values()]


def _merge(per_block: list[list[Stage]], kind: str) -> tuple[tuple[Stage, ...], frozenset[str]]:
    """Merge the stages of all blocks; also return the optional linears."""
    sorter: TopologicalSorter[Stage] = TopologicalSorter()
    for stages in per_block:
        sorter.add(stages[0])
        for before, after in pairwise(stages):
            sorter.add(after, before)
    try:
        merged = tuple(sorter.static_order())
    except CycleError:
        _refuse(kind, "its blocks call the same linears in different orders")
    names = [linear for stage in merged for linear in stage.linears]
    for name in names:
        if names.count(name) > 1:
            _refuse(kind, f"{name} shares its input with other linears in some blocks only")
    everywhere = [{name for stage in stages for name in stage.linears} for stages in per_block]
    return merged, frozenset(names) - frozenset.intersection(*map(frozenset, everywhere))


def _refuse(kind: str, reason: str) -> NoReturn:
    raise CheckpointError(_message(kind, reason))


def _message(kind: str, reason: str) -> str:
    return f"Model type {kind!r} is not declared and cannot be probed: {reason}. {ADVICE}"
