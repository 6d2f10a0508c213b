"""Observe the inputs of linears while a block runs on calibration batches.

Shapes: I input features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.models.layout import Linear
from prunekit.models.sequential.loaded_block import LoadedBlock, StopForward
from prunekit.sparsify.finite_samples import FiniteSamples
from prunekit.statistics import CrossGram, Statistic


@torch.no_grad()
def observe(
    loaded: LoadedBlock,
    stages: Sequence[Sequence[Linear]],
    found: Sequence[tuple[Statistic, ...]],
    *,
    advance_dense: bool = False,
) -> FiniteSamples:
    """Run the block on each batch to update statistics of stages.

    A forward ends as soon as all stages have been observed. The dense model runs too if a
    statistic compares both models. Returned is which samples were finite.

    Args:
        loaded: The block.
        stages: Linears, grouped by their common input.
        found: Statistics of each stage, updated in place.
        advance_dense: Run the dense block to its end, and advance its hidden states.
    """
    dense = loaded.dense if any(CrossGram in map(type, each) for each in found) else None
    observer, finite = _StageObserver(stages, found, dense_to_end=advance_dense), FiniteSamples()
    streams = [
        (stream, note)
        for stream, note in ((dense, observer.note_dense), (loaded, observer.update))
        if stream
    ]
    with ExitStack() as stack:
        finite.watch(loaded, stages, stack)
        for stream, note in streams:
            stack.enter_context(_observed(stream, stages, note))
        every = zip(loaded.samples, *(stream.calls() for stream, _ in streams), strict=True)
        for batch, (samples, *calls) in enumerate(every):
            outputs: list[Tensor] = []
            finite.samples = samples
            for call in calls:
                observer.begin(samples)
                with suppress(StopForward):
                    outputs.append(call())
            if advance_dense and dense:
                # Not before: the input of its last stage may be the hidden states themselves.
                dense.advance_batch(batch, outputs[0])
    return finite


class _StageObserver:
    """Updates statistics batch by batch; the dense model runs first.

    Args:
        stages: Linears, grouped by their common input.
        found: Statistics of each stage, updated in place.
        dense_to_end: The dense model's forward is not ended early.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[Linear]],
        found: Sequence[tuple[Statistic, ...]],
        *,
        dense_to_end: bool,
    ) -> None:
        self._stages, self._found, self._dense_to_end = stages, found, dense_to_end
        self._dense_inputs: dict[int, Tensor] = {}
        self._pending: set[int] = set()  # stages not yet observed in this forward
        self._samples = range(0)
        # Which experts run, and which of them last, depends on the batch.
        self._can_end = not any(linears[0].expert for linears in stages)

    def begin(self, samples: range) -> None:
        """Begin a forward of these samples in one of the models."""
        self._samples = samples
        self._pending.update(range(len(self._stages)))

    def update(self, stage: int, x: Float[Tensor, "... I"]) -> None:
        """Add a stage's input in the pruned model to its statistics."""
        # An expert sees some tokens of the samples only.
        samples = None if self._stages[stage][0].expert else self._samples
        _update(self._found[stage], samples, x, self._dense_inputs.pop(stage, None))
        self._observed(stage, may_end=True)

    def note_dense(self, stage: int, x: Float[Tensor, "... I"]) -> None:
        """Store a stage's input in the dense model for :meth:`update`."""
        self._dense_inputs[stage] = x
        self._observed(stage, may_end=not self._dense_to_end)

    def _observed(self, stage: int, *, may_end: bool) -> None:
        self._pending.discard(stage)
        if self._can_end and may_end and not self._pending:
            raise StopForward


def _update(
    statistics: tuple[Statistic, ...],
    samples: range | None,
    x: Float[Tensor, "... I"],
    dense: Float[Tensor, "... I"] | None = None,
) -> None:
    """Add inputs to statistics; ``samples``: their numbers, None if tokens are routed."""
    for statistic in statistics:
        if isinstance(statistic, CrossGram) and dense is not None:
            statistic.update_pair(x.flatten(0, -2), dense.flatten(0, -2))
        elif statistic.sample_stride > 1 and samples:
            # Some families flatten samples and tokens into one axis before a linear.
            first = -samples.start % statistic.sample_stride
            some = x.reshape(len(samples), -1, x.shape[-1])[first :: statistic.sample_stride]
            statistic.update(some.flatten(0, 1))
        else:
            statistic.update(x.flatten(0, -2))


@contextmanager
def _observed(
    loaded: LoadedBlock, stages: Sequence[Sequence[Linear]], note: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Call ``note`` with number and input of each stage that runs."""
    with ExitStack() as stack:
        for number, linears in enumerate(stages):

            def show(_: nn.Module, inputs: tuple, number: int = number) -> None:
                note(number, inputs[0])

            module = loaded.module.get_submodule(linears[0].path)
            stack.callback(module.register_forward_pre_hook(show).remove)
        for linear in stages[-1] if stages[-1][0].expert else ():
            module = loaded.module.get_submodule(linear.path)
            stack.enter_context(_without_product(module, linear.outputs))
        yield


@contextmanager
def _without_product(module: nn.Module, outputs: int) -> Iterator[None]:
    """Let an expert's linear return zeros: its output affects no observed statistic."""
    module.forward = lambda x: x.new_zeros(1).expand(*x.shape[:-1], outputs)
    try:
        yield
    finally:
        del module.forward
