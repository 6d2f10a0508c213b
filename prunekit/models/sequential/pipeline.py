"""Walks tokens through a model block by block, with the weights of one block in memory.

Shapes: N samples, T tokens, B samples of a batch, D features.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.models import memory
from prunekit.models.sequential.activation_cache import ActivationCache, HiddenStatesFactory
from prunekit.models.sequential.block_runner import Context, StackRunner
from prunekit.models.sequential.hidden_states import HiddenStates, OffloadedHiddenStates, store
from prunekit.models.sequential.weights import Weights, loaded_weights
from prunekit.models.vocabulary import embeddings, vocabulary

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens a forward takes at once: enough to keep the matrix units busy, few enough that the
intermediate activations stay small beside a block's weights."""


@dataclass
class LoadedBlock:
    """One block with its weights loaded and the hidden states that it reads.

    ``hidden`` gives one tensor [B, T, D] a batch. Set ``onward`` to False when nobody reads what
    the block gives. The other ``ranks`` visit the same block with other samples; ``samples`` are
    the numbers that those of each batch have among all of them. Once a block is being pruned by
    stage, ``hidden`` may hold what settled parts of it add. ``dense`` visits it in the dense
    model: with the hidden states that blocks give there, and a ``twin`` of it. ``memo`` is what is
    known of parts of the block, as long as nobody changes them; ``shelf`` makes its places.
    """

    runner: StackRunner
    index: int
    hidden: HiddenStates
    contexts: list[Context]
    samples: Sequence[range] = ()
    propagates: bool = True
    ranks: Ranks = SINGLE
    dense: "LoadedBlock | None" = None
    copy: nn.Module | None = None
    new_hidden_states: HiddenStatesFactory = list
    cache: ActivationCache | None = None

    @property
    def name(self) -> str:
        """Name of the block in the model."""
        return self.runner.names[self.index]

    @property
    def block(self) -> nn.Module:
        """The block itself."""
        return self.copy or self.runner.blocks[self.index]

    @property
    def device(self) -> torch.device:
        """Where the block runs."""
        return (
            self.hidden.device
            if isinstance(self.hidden, OffloadedHiddenStates)
            else self.hidden[0].device
        )

    @property
    def streams(self) -> list["LoadedBlock"]:
        """This visit, and that in the dense model if there is one."""
        return [stream for stream in (self, self.dense) if stream]

    def fork_dense(self) -> None:
        """Let the dense model go on with a copy of the block, which is about to change."""
        if self.dense:
            self.dense.copy = copy.deepcopy(self.block)
            self.dense.propagates = self.propagates

    def detached(self) -> "LoadedBlock":
        """Return a visit of the block that has its weights also when this one has lost them."""
        tensors = [*self.block.parameters(), *self.block.buffers()]
        twin = copy.deepcopy(self.block, {id(tensor): tensor for tensor in tensors})
        return LoadedBlock(self.runner, self.index, [], [], propagates=False, copy=twin)

    def calls(self) -> Iterator[Callable[[], Tensor]]:
        """Give the call of the block on each batch in turn; good until hidden states move on."""
        for batch, (hidden, context) in enumerate(zip(self.hidden, self.contexts, strict=True)):
            call = self.runner.bind(self.index, hidden, context, self.copy)
            yield self.cache.around(batch, hidden, call) if self.cache else call

    @torch.no_grad()
    def probe_residual_adds(self) -> None:
        """Let the memo see, on one sample, what the block does with what its parts give.

        A stack that hands on more than hidden states, or reads more, is not looked at.
        """
        if self.cache and len(self.hidden) and not self.contexts[0] and self.runner.simple:
            sample = self.hidden[0][:1]
            self.cache.probe_residual_adds(
                sample, lambda x: self.runner.bind(self.index, x, {}, self.copy)
            )

    @torch.no_grad()
    def reads(self, path: str) -> Iterator[Tensor]:
        """Give what a module of the block reads of each batch, whose forward ends there."""
        module, read = self.block.get_submodule(path), []

        def end(_: nn.Module, inputs: tuple) -> None:
            read.append(inputs[0])
            raise StopForward

        for call in self.calls():
            hook = module.register_forward_pre_hook(end)
            try:
                with suppress(StopForward):
                    call()
            finally:
                hook.remove()
            yield from read
            read.clear()

    @torch.no_grad()
    def order(self, paths: Collection[str]) -> list[str]:
        """Return modules of the block in the order in which the first batch comes to them."""
        found: list[str] = []
        with ExitStack() as stack:
            for path in paths:
                hook = lambda *_, path=path: found.append(path)  # noqa: E731
                module = self.block.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(hook).remove)
            next(self.calls())()
        return list(dict.fromkeys(found))

    @torch.no_grad()
    def forward(self) -> None:
        """Run the block on each batch for what its hooks see."""
        for call in self.calls():
            call()

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states by what the block makes of them."""
        for number, call in enumerate(self.calls()):
            store(self.hidden, number, call())

    def advance_all(self) -> None:
        """Let both models go on to the next block, where nothing keeps them from it."""
        for stream in self.streams:
            if stream.propagates:
                stream.advance()
            stream.cache = None


class StopForward(Exception):  # noqa: N818  no error
    """Ends the forward of a batch that has shown all that is looked at."""


def batches(ids: Int[Tensor, "N T"], device: torch.device) -> list[Tensor]:
    """Cut samples into batches of about the same number of tokens, on the device."""
    size = max(1, BATCH_TOKENS.get(device.type, 2048) // ids.shape[1])
    return [part.to(device) for part in ids.split(size)]


def iterate_blocks(  # noqa: PLR0913  each is a word of its own
    model: PreTrainedModel,
    stacks: Sequence[StackRunner],
    weights: Weights | None,
    ids: Sequence[Int[Tensor, "B T"]],
    ranks: Ranks = SINGLE,
    *,
    beside: bool = False,
    shelf: Callable[[], HiddenStates] = list,
) -> Iterator[LoadedBlock]:
    """Visit every block in run order; between two visits the hidden states move on.

    While a block is visited the weights of the next one are fetched.

    Whoever iterates may change the visited block's weights; what the next block reads is then what
    the changed block gives. After the last visit, ``hidden`` is what the last block gives.

    Args:
        model: The model; without weights of its own when ``weights`` is given.
        stacks: Its stacks, in run order.
        weights: Where weights come from, or None when the model has them.
        ids: Token batches; a decoder that reads an encoder is given the same tokens.
        ranks: Those who walk with other samples.
        beside: Walk through the dense model too; whoever changes a block has it :meth:`Visit.part`
            before.
        shelf: Makes a place for the hidden states of a stack.
    """
    blocks = [block for runner in stacks for block in runner.blocks]
    following = dict(pairwise(blocks))
    if weights:
        weights.load(model, without=[*blocks, *vocabulary(model, stacks)])
    contexts: list[Context] = [{} for _ in ids]
    samples = _numbered(ids, ranks)
    apart = contexts
    for runner in stacks:
        hidden, dense = shelf(), shelf()
        for index, block in enumerate(runner.blocks):
            with loaded_weights(weights, block):
                if index == 0:
                    with loaded_weights(weights, *embeddings(model, [runner])):
                        # What is entered may be a view of something else.
                        entered = map(runner.enter, ids, contexts)
                        hidden.extend(map(torch.clone, entered))
                    dense.extend(map(torch.clone, hidden) if beside else [])
                # The holes between what one block left lying are not where the next one looks.
                memory.give_back()
                _fetch(weights, following.get(block))
                visit = LoadedBlock(
                    runner, index, hidden, contexts, samples, ranks=ranks, new_hidden_states=shelf
                )
                visit.dense = (
                    LoadedBlock(runner, index, dense, apart, new_hidden_states=shelf)
                    if beside
                    else None
                )
                yield visit
                visit.advance_all()
        if runner is not stacks[-1]:
            contexts = _read(runner, hidden, contexts)
            apart = _read(runner, dense, apart) if beside else contexts


def load_blocks(
    stacks: Sequence[StackRunner], weights: Weights | None, wanted: Collection[int]
) -> Iterator[LoadedBlock]:
    """Visit the blocks with these numbers for their weights alone: no token walks through them."""
    blocks = [(runner, index) for runner in stacks for index in range(len(runner.blocks))]
    numbers = sorted(wanted)
    modules = [blocks[number][0].blocks[blocks[number][1]] for number in numbers]
    following = dict(zip(numbers, modules[1:], strict=False))
    for number in numbers:
        runner, index = blocks[number]
        with loaded_weights(weights, runner.blocks[index]):
            _fetch(weights, following.get(number))
            yield LoadedBlock(runner, index, [], [], propagates=False)


def _numbered(ids: Sequence[Int[Tensor, "B T"]], ranks: Ranks) -> list[range]:
    """Return the numbers of each batch's samples; ranks have them in their order."""
    before = sum(ranks.all_gather_object(sum(map(len, ids)))[: ranks.rank])
    ends = [*accumulate(map(len, ids), initial=before)]
    return [range(*pair) for pair in pairwise(ends)]


def _fetch(weights: Weights | None, module: nn.Module | None) -> None:
    if weights and module:
        weights.fetch(module)


def _read(runner: StackRunner, hidden: HiddenStates, contexts: Sequence[Context]) -> list[Context]:
    """Return what the next stack reads of this one, for each batch."""
    return [
        {"encoder_hidden_states": runner.finish(part, context)}
        for part, context in zip(hidden, contexts, strict=True)
    ]
