"""The main loop: a model block by block, one block in memory.

A run of ``prunekit.runs.sparsify.run`` with ``prunekit.sparsify.block_pruner`` is, in real names::

    hidden states of block 0 = embeddings of split_batches(ids)
    for block in iterate_blocks(...):              # weights of one block; the next one prefetched
        block.fork_dense()                         # the dense model's copy, where it runs too
        block.begin_stages(...)                    # outputs of finished modules will be cached
        for stage in gather_by_stage(block, ...):  # block.calls(): forward, sums over all ranks
            method.prune_together(linears)         # rows split over ranks; weights change in place
            block.settle_stage()                   # its modules are finished, and not run again
        shards.write_block(block, ...)             # atomic; a Record for every fact
        block.propagate()                          # forward with the pruned weights
                                                   # -> hidden states of the next block

``gather_by_stage`` calls ``begin_stages`` and ``settle_stage`` itself, ``iterate_blocks`` calls
``propagate`` when the next block is requested.

Shapes: N samples, T tokens, B samples of a batch, D features.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.models import memory
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.context import Context
from prunekit.models.sequential.hidden_states import HiddenStates, HiddenStatesFactory
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.models.sequential.weights import Weights, loaded_weights
from prunekit.models.vocabulary import input_embeddings, output_heads, vocabulary_modules

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a forward: enough to keep the matrix units busy, few enough that the intermediate
activations are small beside a block's weights."""
OutputsRead = Literal["all", "by-next-block", "none"]
"""Blocks whose output is read: all; all but the last one of the model; none."""


Inputs = Int[Tensor, "B T"] | Mapping[str, Tensor]
"""Tokens of a batch, or named inputs without padding: ``input_ids``, perhaps ``token_type_ids``,
and for a decoder that reads an encoder ``decoder_input_ids`` or ``labels``; without these it gets
the same tokens. With others, such as those of images, the whole model runs once for the batch."""
TEXT = frozenset({"input_ids", "token_type_ids", "decoder_input_ids", "labels"})
"""Inputs that the embeddings and blocks of a stack read by themselves."""


def batch_tokens(device: torch.device) -> int:
    """Return the most tokens of a batch on a device."""
    return BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])


def split_batches(ids: Int[Tensor, "N T"], device: torch.device) -> list[Tensor]:
    """Split samples into batches of similar token counts, on the device."""
    size = max(1, batch_tokens(device) // ids.shape[1])
    return [part.to(device) for part in ids.split(size)]


def iterate_blocks(  # noqa: PLR0913  independent options
    model: PreTrainedModel,
    stacks: Sequence[StackRunner],
    weights: Weights | None,
    inputs: Sequence[Inputs],
    ranks: Ranks = SINGLE,
    *,
    with_dense: bool = False,
    outputs_read: OutputsRead = "all",
    new_hidden_states: HiddenStatesFactory = list,
) -> Iterator[LoadedBlock]:
    """Yield every block in run order, propagating the hidden states.

    The caller may change the block's weights: the next block's input is then the output of the
    changed block. After the last block its ``hidden`` is the output of the stack.

    Args:
        model: The model; without weights of its own when ``weights`` is given.
        stacks: Its stacks, in run order.
        weights: Source of the weights, or None when the model has them.
        inputs: The batches.
        ranks: Processes that run the same blocks with other samples.
        with_dense: Run the dense model too; see :meth:`LoadedBlock.fork_dense`.
        outputs_read: Blocks whose output is read; the others do not propagate.
        new_hidden_states: Makes empty storage for the hidden states of a stack.
    """
    following = _load_outside_blocks(model, stacks, weights)
    batches = [each if isinstance(each, Mapping) else {"input_ids": each} for each in inputs]
    samples = _sample_numbers(batches, ranks)
    streams = [_Stream([Context() for _ in batches]) for _ in range(1 + with_dense)]
    for runner in stacks:
        for index, module in enumerate(runner.blocks):
            after = following.get(module)
            is_read = outputs_read == "all" or (outputs_read == "by-next-block" and bool(after))
            load = partial(LoadedBlock, runner, index, is_read, new_hidden_states)
            with loaded_weights(weights, module):
                if index == 0:
                    _embed(model, runner, weights, batches, streams, new_hidden_states)
                if weights is not None:
                    # Memory fragments of the last block are of no use to the next one.
                    memory.trim_heap()
                _prefetch(weights, after)
                pruned, *others = streams
                dense = [load(each.hidden, each.contexts) for each in others]
                block = load(pruned.hidden, pruned.contexts, samples, ranks, *dense)
                yield block
                block.propagate()
        if runner is not stacks[-1]:
            for stream in streams:
                stream.contexts = _encoder_outputs(runner, stream)


def load_blocks(
    stacks: Sequence[StackRunner], weights: Weights | None, numbers: Collection[int]
) -> Iterator[LoadedBlock]:
    """Yield numbered blocks with their weights, without hidden states.

    Args:
        stacks: Stacks of the model, in run order.
        weights: Source of the weights, or None when the model has them.
        numbers: Numbers of the blocks in the model.
    """
    blocks = [(runner, index) for runner in stacks for index in range(len(runner.blocks))]
    numbers = sorted(numbers)
    modules = [blocks[number][0].blocks[blocks[number][1]] for number in numbers]
    following = dict(zip(numbers, modules[1:], strict=False))
    for number in numbers:
        runner, index = blocks[number]
        with loaded_weights(weights, runner.blocks[index]):
            _prefetch(weights, following.get(number))
            yield LoadedBlock(runner, index, output_is_read=False)


@dataclass
class _Stream:
    """Inputs of the next block in one model, for each batch."""

    contexts: list[Context]
    hidden: HiddenStates = field(default_factory=list)


def _load_outside_blocks(
    model: PreTrainedModel, stacks: Sequence[StackRunner], weights: Weights | None
) -> dict[nn.Module, nn.Module]:
    """Load all but blocks and vocabulary; return each block's successor.

    Stacks that run from token ids need their embeddings at each block.
    """
    blocks = [block for runner in stacks for block in runner.blocks]
    if weights:
        vocabulary = vocabulary_modules(model, [runner.module for runner in stacks])
        if any(runner.stack.reads_ids for runner in stacks):
            vocabulary = output_heads(model)
        weights.load(model, without=[*blocks, *vocabulary])
    return dict(pairwise(blocks))


def _embed(
    model: PreTrainedModel,
    runner: StackRunner,
    weights: Weights | None,
    batches: Sequence[Mapping[str, Tensor]],
    streams: Sequence[_Stream],
    new_hidden_states: HiddenStatesFactory,
) -> None:
    """Set the hidden states to the input of a stack's first block."""
    pruned, *others = streams
    for stream in streams:
        stream.hidden = new_hidden_states()
    tables = [] if runner.stack.reads_ids else input_embeddings(model, [runner.module])
    with loaded_weights(weights, *tables):
        # Cloned: the input may be a view of another tensor.
        for batch, context in zip(batches, pruned.contexts, strict=True):
            pruned.hidden.extend([_enter(model, runner, batch, context).clone()])
    for stream in others:
        stream.hidden.extend(map(torch.clone, pruned.hidden))
        for context, known in zip(stream.contexts, pruned.contexts, strict=True):
            context.recorded = known.recorded
    for stream in streams if runner.stack.reads_ids else ():
        for batch, context in zip(batches, stream.contexts, strict=True):
            context["input_ids"] = _tokens(model, batch, context)


def _enter(
    model: PreTrainedModel, runner: StackRunner, batch: Mapping[str, Tensor], context: Context
) -> Tensor:
    """Return the input of a stack's first block for a batch."""
    if not (batch.keys() <= TEXT or context):
        return runner.record(batch, context)
    kinds = {name: batch[name] for name in ("token_type_ids",) if name in batch and not context}
    return runner.enter(_tokens(model, batch, context), Context({**context, **kinds}))


def _tokens(model: PreTrainedModel, batch: Mapping[str, Tensor], context: Context) -> Tensor:
    """Return the tokens that a stack reads.

    For a decoder that reads an encoder, the model makes them of ``labels``.
    """
    if "encoder_hidden_states" not in context or not batch.keys() & {"decoder_input_ids", "labels"}:
        return batch["input_ids"]
    if "decoder_input_ids" in batch:
        return batch["decoder_input_ids"]
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels")  # noqa: B009  of most
    return shift(labels=batch["labels"])


def _sample_numbers(batches: Sequence[Mapping[str, Tensor]], ranks: Ranks) -> list[range]:
    """Return the numbers of each batch's samples; ranks hold consecutive samples."""
    counts = [len(batch["input_ids"]) for batch in batches]
    before = sum(ranks.all_gather_object(sum(counts))[: ranks.rank])
    ends = [*accumulate(counts, initial=before)]
    return [range(*pair) for pair in pairwise(ends)]


def _prefetch(weights: Weights | None, module: nn.Module | None) -> None:
    if weights and module:
        weights.fetch(module)


def _encoder_outputs(runner: StackRunner, stream: _Stream) -> list[Context]:
    """Return the further inputs of the next stack, for each batch."""
    return [
        Context({"encoder_hidden_states": runner.finish(hidden, context)})
        for hidden, context in zip(stream.hidden, stream.contexts, strict=True)
    ]
