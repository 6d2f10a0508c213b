"""The main loop: a model block by block, one block in memory.

A run of ``prunekit.runs.sparsify.run`` with ``prunekit.sparsify.block_pruner`` is, in real names::

    hidden states of block 0 = embeddings of split_batches(ids)
    for block in iterate_blocks(...):              # weights of one block; the next one prefetched
        block.fork_dense()                         # the dense model's copy, where it runs too
        block.begin_stages(...)                    # outputs of finished modules will be cached
        for stage in gather_by_stage(block, ...):  # block.calls(): forward, sums over all ranks
            method.prune_together(linears)         # rows split over ranks; weights change in place
            block.settle_stage()                   # its modules are finished, and not run again
        written.write(block)                       # atomic, while the next block is pruned
        block.propagate()                          # forward with the pruned weights
                                                   # -> hidden states of the next block

``gather_by_stage`` calls ``begin_stages`` and ``settle_stage`` itself, ``iterate_blocks`` calls
``propagate`` when the next block is requested.

Shapes: N samples, T tokens, B samples of a batch, D features.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.models import memory
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.context import Context
from prunekit.models.sequential.entry import Entry, Stream, is_image
from prunekit.models.sequential.hidden_states import HiddenStatesFactory
from prunekit.models.sequential.kept_towers import KeptTowers
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.models.sequential.weights import Weights, loaded_weights
from prunekit.models.vocabulary import output_heads, vocabulary_modules

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a forward: enough to keep the matrix units busy, few enough that the intermediate
activations are small beside a block's weights."""
OutputsRead = Literal["all", "by-next-block", "none"]
"""Blocks whose output is read: all; all but the last one of the model; none."""


Inputs = Int[Tensor, "B T"] | Mapping[str, Tensor]
"""Tokens of a batch, or named inputs without padding: ``input_ids``, perhaps ``token_type_ids``,
and for a decoder that reads an encoder ``decoder_input_ids`` or ``labels``; without these it gets
the same tokens. With others, such as those of images, the whole model runs once for the batch."""


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
    entry = Entry(model, weights, new_hidden_states, KeptTowers(weights))
    contexts: list[list[Context]] | None = None
    for runner in stacks:
        own = [n for n, batch in enumerate(batches) if not runner.stack.tower or is_image(batch)]
        contexts = contexts or [[Context() for _ in own] for _ in range(1 + with_dense)]
        streams = [*map(Stream, contexts)]
        embed = partial(entry.embed, runner, [batches[n] for n in own], streams)
        for index, module in enumerate(runner.blocks):
            after = following.get(module)
            keeps = runner.stack.tower and runner is not stacks[-1]
            with entry.towers.loaded(module) if keeps else loaded_weights(weights, module):
                if index == 0:
                    embed()
                _make_room(weights, after)
                is_read = _is_read(outputs_read, after)
                load = partial(LoadedBlock, runner, index, is_read, new_hidden_states)
                block = _loaded_block(load, streams, [samples[n] for n in own], ranks)
                yield block
                block.propagate()
        ends = runner.stack.tower or runner is stacks[-1]
        contexts = None if ends else [_encoder_outputs(runner, stream) for stream in streams]


def _is_read(outputs_read: OutputsRead, after: object) -> bool:
    """Return whether the output of a block is read."""
    return outputs_read == "all" or (outputs_read == "by-next-block" and bool(after))


def _make_room(weights: Weights | None, after: nn.Module | None) -> None:
    """Free the last block's memory, and begin to read the next."""
    if weights is not None:
        # Memory fragments of the last block are of no use to the next one.
        memory.trim_heap()
    _prefetch(weights, after)


def _loaded_block(
    load: Callable[..., LoadedBlock],
    streams: Sequence[Stream],
    numbers: Sequence[range],
    ranks: Ranks,
) -> LoadedBlock:
    """Return a block with hidden states of pruned and dense model."""
    pruned, *others = streams
    dense = [load(each.hidden, each.contexts) for each in others]
    return load(pruned.hidden, pruned.contexts, numbers, ranks, *dense)


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


def _sample_numbers(batches: Sequence[Mapping[str, Tensor]], ranks: Ranks) -> list[range]:
    """Return the numbers of each batch's samples; ranks hold consecutive samples."""
    counts = [len(batch["input_ids"]) for batch in batches]
    before = sum(ranks.all_gather_object(sum(counts))[: ranks.rank])
    ends = [*accumulate(counts, initial=before)]
    return [range(*pair) for pair in pairwise(ends)]


def _prefetch(weights: Weights | None, module: nn.Module | None) -> None:
    if weights and module:
        weights.fetch(module)


def _encoder_outputs(runner: StackRunner, stream: Stream) -> list[Context]:
    """Return the further inputs of the next stack, for each batch."""
    return [
        Context({"encoder_hidden_states": runner.finish(hidden, context)})
        for hidden, context in zip(stream.hidden, stream.contexts, strict=True)
    ]
