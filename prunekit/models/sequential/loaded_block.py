"""One block of a model, loaded, with its hidden states.

Shapes: B samples of a batch, T tokens, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.models.sequential.activation_cache import ActivationCache
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.cached_module import ModuleTraits
from prunekit.models.sequential.checks import Checks
from prunekit.models.sequential.context import Context
from prunekit.models.sequential.hidden_states import (
    HiddenStates,
    HiddenStatesFactory,
    OffloadedHiddenStates,
    store,
)


class StopForward(Exception):  # noqa: N818  no error
    """Ends a forward once everything to be observed has been."""


@dataclass
class _Progress:
    """State of a block, changed by methods of :class:`LoadedBlock` only."""

    copy: nn.Module | None = None
    cache: ActivationCache | None = None
    folds: bool = False
    advanced: bool = False


@dataclass(frozen=True, eq=False)
class LoadedBlock:
    """A loaded block and its hidden states, which :meth:`propagate` advances exactly once.

    The fields are constant. Whoever changes the weights of ``module`` calls :meth:`fork_dense`
    before; whoever prunes by stages calls :meth:`begin_stages`, and :meth:`settle_stage` after
    each stage.

    Attributes:
        runner: The stack of the block.
        index: Its number within the stack.
        output_is_read: The next block, or the caller, reads the output.
        new_hidden_states: Makes empty storage for tensors of batches.
        hidden: Its input: one tensor [B, T, D] a batch. While it is pruned by stages, outputs of
            settled modules may be folded into it; after :meth:`propagate`, the block's output.
        contexts: Further inputs of each batch.
        samples: Numbers of each batch's samples among those of all ranks.
        ranks: The processes that have the same block loaded, with other samples.
        dense: The same block of the dense model, with hidden states of that; None without it.
        checks: What must hold of its weights and of its inputs.
    """

    runner: StackRunner
    index: int
    output_is_read: bool = True
    new_hidden_states: HiddenStatesFactory = list
    hidden: HiddenStates = field(default_factory=list)
    contexts: Sequence[Context] = ()
    samples: Sequence[range] = ()
    ranks: Ranks = SINGLE
    dense: LoadedBlock | None = None
    checks: Checks = field(default_factory=Checks, init=False, repr=False)
    _progress: _Progress = field(default_factory=_Progress, init=False, repr=False)

    @property
    def name(self) -> str:
        """Name of the block in the model."""
        return self.runner.names[self.index]

    @property
    def module(self) -> nn.Module:
        """The block itself; in the dense model the copy of :meth:`fork_dense`."""
        return self._progress.copy or self.runner.blocks[self.index]

    @property
    def device(self) -> torch.device:
        """Device on which the block runs."""
        if isinstance(self.hidden, OffloadedHiddenStates):
            return self.hidden.device
        if len(self.hidden):
            return self.hidden[0].device
        return next(self.module.parameters()).device

    @property
    def streams(self) -> list[LoadedBlock]:
        """This block, and that of the dense model if there is one."""
        return [stream for stream in (self, self.dense) if stream]

    def fork_dense(self) -> None:
        """Copy the block for the dense model, before its weights change."""
        if self.dense:
            self.dense._progress.copy = copy.deepcopy(self.module)

    def detached(self) -> LoadedBlock:
        """Return the block without hidden states, keeping its weights loaded."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        kept = LoadedBlock(self.runner, self.index, output_is_read=False)
        kept._progress.copy = copy.deepcopy(self.module, {id(tensor): tensor for tensor in tensors})
        return kept

    def calls(self) -> Iterator[Callable[[], Tensor]]:
        """Yield the call of the block on each batch.

        A call is valid until the hidden states advance.
        """
        state = self._progress
        for batch, (hidden, context) in enumerate(zip(self.hidden, self.contexts, strict=True)):
            call = self.runner.bind(self.index, hidden, context, state.copy)
            yield state.cache.around(batch, hidden, call) if state.cache else call

    def bind(self, batch: int, module: Callable[..., Any]) -> Callable[[], Float[Tensor, "B T D"]]:
        """Return the call of ``module`` on a batch, replacing the block."""
        return self.runner.bind(self.index, self.hidden[batch], self.contexts[batch], module)

    @torch.no_grad()
    def run(self) -> None:
        """Run the block on each batch, for its hooks only."""
        for call in self.calls():
            call()

    @torch.no_grad()
    def inputs_of(self, path: str) -> Iterator[Tensor]:
        """Yield a module's input for each batch; the forward ends there."""
        module, inputs = self.module.get_submodule(path), []

        def end(_: nn.Module, args: tuple) -> None:
            inputs.append(args[0])
            raise StopForward

        for call in self.calls():
            hook = module.register_forward_pre_hook(end)
            try:
                with suppress(StopForward):
                    call()
            finally:
                hook.remove()
            yield from inputs
            inputs.clear()

    @torch.no_grad()
    def execution_order(self, paths: Collection[str]) -> list[str]:
        """Return modules of the block in their order of execution."""
        found: list[str] = []
        with ExitStack() as stack:
            for path in paths:
                hook = lambda *_, path=path: found.append(path)  # noqa: E731
                module = self.module.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(hook).remove)
            next(self.calls())()
        return list(dict.fromkeys(found))

    def begin_stages(self, stages: Sequence[Sequence[str]], *, fold: bool = False) -> None:
        """Cache outputs of modules while the block is pruned by stages.

        Args:
            stages: Paths of the linears that are pruned, in the order in which they run.
            fold: The block's input is not needed again as it is, so outputs that the block only
                adds to it may be folded into it.
        """
        traits: dict[str, ModuleTraits] = {}
        for stream in self.streams:
            cache = ActivationCache(stream.module, stages, stream.new_hidden_states, traits)
            stream._progress.cache, stream._progress.folds = cache, fold
        if fold:
            self._probe_residual_adds()

    def settle_stage(self) -> None:
        """Mark the current stage as pruned; modules it completes are cached."""
        for stream in self.streams:
            state = stream._progress
            if state.cache:
                state.cache.settle_stage(stream.hidden if state.folds else None)

    def end_stages(self) -> None:
        """Drop cached outputs, before weights of settled modules change."""
        for stream in self.streams:
            stream._progress.cache = None

    @torch.no_grad()
    def _probe_residual_adds(self) -> None:
        """Find modules to fold, on one sample.

        Blocks with further inputs or outputs are left out.
        """
        cache = self._progress.cache
        if not (cache and len(self.hidden) and self.runner.simple):
            return
        context = self.contexts[0]
        if not (context or context.shared or context.recorded):
            sample = self.hidden[0][:1]
            cache.probe_residual_adds(
                sample, lambda x: self.runner.bind(self.index, x, Context(), self._progress.copy)
            )

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states by the output, even if unread."""
        for batch, call in enumerate(self.calls()):
            self.advance_batch(batch, call())
        self._progress.advanced = True

    def advance_batch(self, batch: int, output: Float[Tensor, "B T D"]) -> None:
        """Replace the hidden states of one batch by a computed output.

        The batches come in order; after the last one the stream has advanced, and its cache and
        the copy of the block are dropped.
        """
        store(self.hidden, batch, output)
        if batch + 1 == len(self.hidden):
            state = self._progress
            state.advanced, state.cache, state.copy = True, None, None

    def propagate(self) -> None:
        """Advance the hidden states to the next block, unless already done.

        Those of the dense model too. Where nobody reads the output the block does not run.
        """
        for stream in self.streams:
            if stream.output_is_read and not stream._progress.advanced:
                stream.advance()
            stream._progress.cache = None
