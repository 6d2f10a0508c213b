"""Finds the blocks and stages of a model type nobody declared, by watching one forward of it.

The forward runs on a twin of the model whose tensors are fake: shapes and the identity of tensors
are there, numbers and memory are not, so a model of any size is probed in seconds. (The meta
device would do but for masks: transformers reads numbers there unless it knows it is traced.)
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
from prunekit.architectures.coverage import ADVICE, LINEAR, linears, prefix, refuse_fused_experts
from prunekit.architectures.probed_heads import Seen, attentions, memory, narrow, seeing
from prunekit.errors import CheckpointError

# What a forward raises where it needs numbers, and what a model does that cannot start from
# embeddings alone.
UNRUNNABLE = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)

Read = tuple[object, ...]


def probe(model: PreTrainedModel) -> Architecture:
    """Return where ``model`` keeps its blocks and which of its linears read the same tensor.

    Blocks are the one ``ModuleList`` of modules of one class that contain linears. Stages, and the
    linears within, are in the order of their first call. Linears that only some blocks have are
    optional.

    Raises:
        CheckpointError: There is no such list or more than one, the model does not run from
            embeddings, or the linears of its blocks are not each called once, block after block.
    """
    base, kind = cast(PreTrainedModel, model.base_model), model.config.model_type
    lists = _block_lists(base)
    if not lists:
        _refuse(kind, "no ModuleList was found whose modules are of one class and contain linears")
    if len(lists) > 1:
        _refuse(kind, f"probing runs one list of blocks, this model has {', '.join(lists)}")
    (blocks,) = lists
    refuse_fused_experts(model, blocks)
    reads, attentions = _reads(base, kind, blocks)
    for linear in linears(base.get_submodule(blocks)):
        if f"{blocks}.{linear}" not in reads:
            _refuse(kind, f"{prefix(model)}{blocks}.{linear} was never called in a forward")
    stages, optional = _merge(_per_block(reads, blocks, kind), kind)
    stack = Stack(blocks, stages, optional=optional, attentions=attentions)
    return Architecture((kind,), (stack,), probed=True)


def _block_lists(base: nn.Module) -> list[str]:
    """Return the names of what may be blocks; lists inside their modules are not."""
    found: list[str] = []
    for name, module in base.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            alike = len({type(child) for child in module}) == 1 and not isinstance(
                module[0], LINEAR
            )
            if alike and all(linears(child) for child in module):
                found.append(name)
    return found


def _reads(
    base: PreTrainedModel, kind: str, blocks: str
) -> tuple[dict[str, Read], tuple[Attention, ...]]:
    """Return what each linear reads in one forward, and where the blocks keep their heads.

    Reads are in call order, and equal ones are of the same tensor. No heads are found where blocks
    do not keep them alike, in linears of their own, or where a twin with fewer does not run.
    """
    reads: dict[str, Read] = {}
    kept: list[Tensor] = []

    def watch(name: str, seen: Seen) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name in reads:
                _refuse(kind, f"{name} is called more than once in a forward")
            reads[name] = _identity(inputs[0])
            seen.reads[name], seen.writes[name] = memory(inputs[0]), memory(output)
            # A freed tensor would lend its identity to a later one.
            kept.extend([inputs[0], output])

        return hook

    config = copy.deepcopy(base.config)
    with torch.inference_mode(mode=False), torch.no_grad(), FakeTensorMode():
        try:
            with no_init_weights(), seeing(type(base), config) as seen:
                twin = type(base)(config).eval()
                handles = [
                    linear.register_forward_hook(watch(name, seen))
                    for name, linear in linears(twin).items()
                ]
                _run(twin)
        except UNRUNNABLE as error:
            reason = (
                f"its forward does not run from inputs_embeds without reading numbers ({error})"
            )
            raise CheckpointError(_message(kind, reason)) from error
        found = attentions(twin, blocks, seen, reads)
        for handle in handles:
            handle.remove()
        try:
            if found and narrow(twin, blocks, found):
                with seeing(type(base), config):
                    _run(twin)
        except UNRUNNABLE:
            found = ()
    return reads, found


def _run(twin: PreTrainedModel) -> None:
    # What does not run is an answer here, of which torch would make a page of log.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        _forward(twin)
    finally:
        log.disabled = before


def _forward(twin: PreTrainedModel) -> None:
    width = next(twin.get_input_embeddings().parameters()).shape[1]
    twin(inputs_embeds=torch.empty(1, 4, width), use_cache=False)


def _identity(x: Tensor) -> Read:
    """Return the same for tensors that hold the same numbers because they share their memory.

    The batch being one, joining batch and tokens is no difference. The version tells a tensor from
    what an operation in place has made of it since.
    """
    rows = x.squeeze()
    place = rows.untyped_storage()._cdata, rows.storage_offset()
    return *place, rows.shape, rows.stride(), rows._version


def _per_block(reads: dict[str, Read], blocks: str, kind: str) -> list[list[Stage]]:
    """Return the stages of each block."""
    groups: dict[str, dict[Read, list[str]]] = {}
    for name, read in reads.items():
        if name.startswith(f"{blocks}."):
            index, linear = name.removeprefix(f"{blocks}.").split(".", 1)
            groups.setdefault(index, {}).setdefault(read, []).append(linear)
    order = [int(index) for index in groups]
    if order != sorted(order):
        _refuse(kind, f"the blocks {blocks} are not called in the order of their list: {order}")
    return [[Stage(*names) for names in group.values()] for group in groups.values()]


def _merge(per_block: list[list[Stage]], kind: str) -> tuple[tuple[Stage, ...], frozenset[str]]:
    """Return one order of stages that is the order of every block, and the optional linears."""
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
