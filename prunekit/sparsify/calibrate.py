"""Gathers what the linears of a block read, for all ranks; sees to experts that read too little.

Shapes: I input features, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.allocations import Allocation, Survey
from prunekit.errors import NumericsError
from prunekit.methods.layer import Layer
from prunekit.models import memory
from prunekit.models.experts import Expert
from prunekit.models.layout import Block, Linear, read
from prunekit.models.sequential.activation_cache import ActivationCache, ModuleTraits
from prunekit.models.sequential.hidden_states import store
from prunekit.models.sequential.pipeline import LoadedBlock, StopForward
from prunekit.patterns import Pattern
from prunekit.sparsify.recipe import ExpertCoverage
from prunekit.statistics import (
    CrossGram,
    StageStatistics,
    Statistic,
    union,
)


def gather(
    visit: LoadedBlock,
    stages: Sequence[Sequence[Linear]],
    needs: Sequence[type[Statistic]],
    hunger: ExpertCoverage | None = None,
) -> Iterator[tuple[Sequence[Linear], StageStatistics]]:
    """Gather ``needs`` for each stage in one forward, then give the stages with their own.

    Args:
        visit: The block.
        stages: Linears that read the same tensor.
        needs: What to gather.
        hunger: What is done with experts to which few tokens are routed; None for nothing.

    Raises:
        NumericsError: The input of a linear is NaN or inf in some sample, or an expert is starved
            and must not be.
    """
    found = [_empty(visit, linears, needs) for linears in stages]
    if needs and stages:
        _observe(visit, stages, found)
    given = _gathered(visit, stages, found, hunger)
    del found  # whoever is given the statistics can let go of them
    yield from zip(stages, given, strict=True)


def gather_in_turn(
    visit: LoadedBlock,
    stages: Sequence[Sequence[Linear]],
    needs: Sequence[type[Statistic]],
    hunger: ExpertCoverage | None = None,
    *,
    last: bool,
) -> Iterator[tuple[Sequence[Linear], StageStatistics]]:
    """Give each stage with statistics that saw the pruned ones before it.

    With ``last`` the dense model goes on to the next block, if nothing keeps it from it.
    """
    paths = [[linear.path for linear in linears] for linears in stages]
    forms: dict[str, ModuleTraits] = {}
    for stream in visit.streams:
        stream.cache = ActivationCache(stream.block, paths, stream.new_hidden_states, forms)
    if last:
        visit.probe_residual_adds()
    for number, linears in enumerate(stages, 1):
        found = [_empty(visit, linears, needs)]
        memory.give_back()
        _observe(visit, [linears], found, onward=last and number == len(stages))
        memory.give_back()
        stats = _gathered(visit, [linears], found, hunger)[0]
        del found  # whoever is given the statistics can let go of them
        yield linears, stats
        del stats  # before the next stage is looked at
        for stream in visit.streams:
            if stream.cache:
                stream.cache.stage = number
                if last and number < len(stages):
                    stream.cache.fold_into_hidden(stream.hidden)
    memory.give_back()


def _empty(
    visit: LoadedBlock, linears: Sequence[Linear], needs: Sequence[type[Statistic]]
) -> tuple[Statistic, ...]:
    # What an expert reads in the dense model is of other tokens than in the pruned one.
    kinds = [kind for kind in needs if not (linears[0].expert and kind is CrossGram)]
    return tuple(kind(linears[0].inputs, visit.device) for kind in kinds)


def _own(linears: Sequence[Linear], samples: range) -> range | None:
    """Return which samples of a batch linears read; None for an expert, which reads some tokens."""
    return None if linears[0].expert else samples


def _update(
    statistics: tuple[Statistic, ...],
    samples: range | None,
    x: Float[Tensor, "... I"],
    dense: Float[Tensor, "... I"] | None = None,
) -> None:
    for statistic in statistics:
        if isinstance(statistic, CrossGram) and dense is not None:
            statistic.update_pair(x.flatten(0, -2), dense.flatten(0, -2))
        elif statistic.sample_stride > 1 and samples:
            # Some families flatten samples away before a linear.
            first = -samples.start % statistic.sample_stride
            some = x.reshape(len(samples), -1, x.shape[-1])[first :: statistic.sample_stride]
            statistic.update(some.flatten(0, 1))
        else:
            statistic.update(x.flatten(0, -2))


def _gathered(
    visit: LoadedBlock,
    stages: Sequence[Sequence[Linear]],
    found: Sequence[tuple[Statistic, ...]],
    hunger: ExpertCoverage | None,
) -> list[StageStatistics]:
    """Return what all ranks found for each stage; starved experts are seen to."""
    for linears, statistics in zip(stages, found, strict=True):
        _merge(visit, linears, statistics)
    gathered = [
        StageStatistics(
            statistics,
            statistics[0].tokens if linears[0].expert and statistics else None,
            ranks=visit.ranks,
        )
        for linears, statistics in zip(stages, found, strict=True)
    ]
    starved = [
        number
        for number, stats in enumerate(gathered)
        if hunger and stats.routed is not None and stats.routed < hunger.below
    ]
    if not hunger or not starved:
        return gathered
    if hunger.policy == "error":
        raise NumericsError(
            f"{stages[starved[0]][0].name}: {gathered[starved[0]].routed} tokens are routed to its "
            f"expert, fewer than the {hunger.below} of starved_below. Use more calibration text, "
            "or another policy in `starved`."
        )
    again = [found[number] for number in starved]
    if hunger.policy == "all-tokens":
        again = _of_all_tokens(visit, [stages[number] for number in starved], again[0])
    for number, statistics in zip(starved, again, strict=True):
        routed = gathered[number].routed
        gathered[number] = StageStatistics(statistics, routed, hunger.policy, visit.ranks)
    return gathered


def _of_all_tokens(
    visit: LoadedBlock, stages: Sequence[Sequence[Linear]], like: Sequence[Statistic]
) -> list[tuple[Statistic, ...]]:
    """Return the statistics of experts, of kinds as in ``like``, as if all tokens went to them."""
    experts = [
        cast("Expert", visit.block.get_submodule(str(linears[0].expert))) for linears in stages
    ]
    found = [_empty(visit, linears, [*map(type, like)]) for linears in stages]
    for expert in experts:
        expert.reads_all = True
    _observe(visit, stages, found)
    for expert in experts:
        expert.reads_all = False
    for linears, statistics in zip(stages, found, strict=True):
        _merge(visit, linears, statistics)
    return found


def _merge(
    visit: LoadedBlock, linears: Sequence[Linear], statistics: tuple[Statistic, ...]
) -> None:
    """Make statistics those of the tokens of all ranks, and look whether they are numbers."""
    visit.ranks.merge(statistics)
    if not all(statistic.finite() for statistic in statistics):
        raise NumericsError(_blame(visit, linears[0]))


@torch.no_grad()
def _observe(
    visit: LoadedBlock,
    stages: Sequence[Sequence[Linear]],
    found: Sequence[tuple[Statistic, ...]],
    *,
    onward: bool = False,
) -> None:
    """Update what is found with each batch; ``onward``: let the dense model go on on the way."""
    dense = visit.dense if any(CrossGram in map(type, each) for each in found) else None
    look = _Look(stages, found, through=onward)
    streams = [(each, seen) for each, seen in ((dense, look.note), (visit, look.update)) if each]
    with ExitStack() as stack:
        for stream, seen in streams:
            stack.enter_context(_shown(stream, stages, seen))
        every = zip(visit.samples, *(stream.calls() for stream, _ in streams), strict=True)
        for batch, (samples, *calls) in enumerate(every):
            given: list[Tensor] = []
            for call in calls:
                look.begin(samples)
                with suppress(StopForward):
                    given.append(call())
            if onward and dense:
                # Not before: what its last stage read may be the hidden states themselves.
                store(dense.hidden, batch, given[0])
    if onward and dense:
        dense.propagates, dense.cache, dense.copy = False, None, None


class _Look:
    """Looks at what stages read, batch after batch: in the dense model first, if that counts.

    ``through``: A batch goes on to its end in the dense model.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[Linear]],
        found: Sequence[tuple[Statistic, ...]],
        *,
        through: bool,
    ) -> None:
        self._stages, self._found, self._through = stages, found, through
        self._read: dict[int, Tensor] = {}  # what the dense model's stages read
        self._left: set[int] = set()  # stages that are yet to be shown
        self._samples = range(0)
        # Which experts are called, and when the last of them, depends on the batch.
        self._ends = not any(linears[0].expert for linears in stages)

    def begin(self, samples: range) -> None:
        """Begin with a batch of these samples in one of the models."""
        self._samples = samples
        self._left.update(range(len(self._stages)))

    def update(self, stage: int, x: Tensor) -> None:
        """See what a stage reads in the pruned model."""
        samples = _own(self._stages[stage], self._samples)
        _update(self._found[stage], samples, x, self._read.pop(stage, None))
        self._shown(stage, enough=True)

    def note(self, stage: int, x: Tensor) -> None:
        """See what a stage reads in the dense model."""
        self._read[stage] = x
        self._shown(stage, enough=not self._through)

    def _shown(self, stage: int, *, enough: bool) -> None:
        self._left.discard(stage)
        if self._ends and enough and not self._left:
            raise StopForward


@contextmanager
def _shown(
    visit: LoadedBlock, stages: Sequence[Sequence[Linear]], look: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Show what each stage reads, with its number."""
    with ExitStack() as stack:
        for number, linears in enumerate(stages):

            def show(_: nn.Module, inputs: tuple, number: int = number) -> None:
                look(number, inputs[0])

            module = visit.block.get_submodule(linears[0].path)
            stack.callback(module.register_forward_pre_hook(show).remove)
        for linear in stages[-1] if stages[-1][0].expert else ():
            module = visit.block.get_submodule(linear.path)
            stack.enter_context(_silent(module, linear.outputs))
        yield


class _silent:  # noqa: N801  used as a context
    """Spares an expert a product: nothing that is observed depends on the last stage's output."""

    def __init__(self, module: nn.Module, outputs: int) -> None:
        self.module, self.outputs = module, outputs

    def __enter__(self) -> None:
        self.module.forward = lambda x: x.new_zeros(1).expand(*x.shape[:-1], self.outputs)

    def __exit__(self, *_: object) -> None:
        del self.module.forward


def _blame(visit: LoadedBlock, linear: Linear) -> str:
    """Say in which sample the input of ``linear`` is not finite; run only after it was found so."""
    broken: list[bool] = []
    # An expert reads tokens of any sample; all of its block's experts read them in their order.
    path = linear.expert.rpartition(".")[0] if linear.expert else linear.path
    module = visit.block.get_submodule(path)

    def look(_: nn.Module, inputs: tuple) -> None:
        tokens = (~inputs[0].isfinite()).any(-1).flatten()
        samples = tokens.view(-1, visit.hidden[0].shape[1])
        broken.extend(samples.any(1).tolist())

    hook = module.register_forward_pre_hook(look)
    visit.forward()
    hook.remove()
    # Ranks have the samples in their order.
    broken = [sample for samples in visit.ranks.all_gather_object(broken) for sample in samples]
    if True in broken:
        return f"{linear.name}: its input is NaN or inf in calibration sample {broken.index(True)}."
    return f"{linear.name}: the squares of its inputs overflow float32."


def survey(
    visits: Callable[[], Iterator[tuple[LoadedBlock, Block]]],
    allocation: Allocation,
    pattern: Pattern,
) -> Survey:
    """Return walks over the dense model for an allocation that looks at it."""
    needs = union(allocation.needs)

    def walk_once() -> Iterator[list[Layer]]:
        for visit, block in visits():
            visit.propagates = bool(needs)
            yield [
                Layer(linear.name, read(visit.block, linear), stats, pattern, 0.0)
                for linears, stats in gather(visit, block.pruned_stages, needs)
                for linear in linears
            ]

    return walk_once
