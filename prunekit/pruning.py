"""Prunes one block: gather what its methods need, prune linear by linear.

Shapes: O output features, I input features, T tokens.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.allocations import Allocation, Survey
from prunekit.errors import NumericsError
from prunekit.layer import Layer, Rows
from prunekit.layout import Block, Linear, orientation
from prunekit.lockstep import Lockstep
from prunekit.methods import Method
from prunekit.patterns import Pattern
from prunekit.ranks import ALONE, Ranks
from prunekit.refinement import Refine, refine
from prunekit.schedules import SCHEDULES
from prunekit.sections import Prune
from prunekit.spread import dealt, spread
from prunekit.statistics import Cross, Gathered, Gram, Statistic, union
from prunekit.target import Target, aim
from prunekit.walk import Visit

Parts = list[slice] | None
"""The rows of a linear that each rank prunes; None where each prunes all of them."""
ENERGY_PANEL = 512
"""Columns of a weight that are multiplied by the Gram matrix at once."""


@dataclass(frozen=True)
class Recipe:
    """How blocks are pruned.

    Attributes:
        method: Chooses and changes weights.
        pattern: Which zeros are allowed.
        propagation: "stage": each stage sees what the pruned stages before it give. "block": all
            see what the dense block gives, from one forward of its own.
        refine: What is done to the weights that stay.
        target: What they aim at.
        steps: Prune in so many steps, gathering anew before each.
        schedule: Sparsity over the steps.
        initial_sparsity: Where the schedule starts.
        measure_error: Gather the Gram matrix whatever the method needs, for the relative error.
    """

    method: Method
    pattern: Pattern
    propagation: Literal["block", "stage"] = "stage"
    refine: Refine | None = None
    target: Target = "layer"
    steps: int = 1
    schedule: str = "cubic"
    initial_sparsity: float = 0.0
    measure_error: bool = True

    @classmethod
    def of(cls, prune: Prune, *, calibrated: bool) -> Self:
        """Return what the section ``[prune]`` of a config says."""
        return cls(
            method=prune.method,
            pattern=prune.pattern,
            propagation=prune.propagation,
            refine=prune.refine,
            target=prune.target,
            steps=prune.steps,
            schedule=prune.schedule,
            initial_sparsity=prune.initial_sparsity,
            measure_error=prune.measure_error and calibrated,
        )

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """What is gathered for each stage."""
        grams = [Gram] if self.refine or self.measure_error else []
        aims = [Gram, Cross] if self.beside else []
        return union([*self.method.needs, *grams, *aims])

    @property
    def beside(self) -> bool:
        """Whether the dense model is walked through beside the pruned one."""
        return self.target == "dense"

    def sparsity(self, step: int, final: float) -> float:
        """Return the sparsity to reach in ``step`` of 1..steps; the last is always ``final``."""
        schedule = SCHEDULES[self.schedule if self.steps > 1 else "one-shot"]
        return schedule(step, self.steps, final, min(self.initial_sparsity, final))


@dataclass(frozen=True)
class Outcome:
    """What became of one linear: its weight as it will be stored and its entry in the report."""

    linear: Linear
    weight: Tensor
    entry: dict[str, Any]


@dataclass(frozen=True)
class BlockPruner:
    """Prunes loaded blocks in place.

    Attributes:
        recipe: How.
        sparsities: Full name of each linear → its sparsity.
        dtypes: Full name → the type in which its weight will be stored. The block goes on with the
            stored value, so that the next one is calibrated on what the file holds.
        at_once: Let all batches wait at each stage, so that propagation by stage costs one forward
            of the block; it holds what a stage reads for all tokens. Otherwise one forward a stage.
    """

    recipe: Recipe
    sparsities: Mapping[str, float]
    dtypes: Mapping[str, torch.dtype]
    at_once: bool = True

    def prune(self, visit: Visit, plan: Block) -> Iterator[Outcome]:
        """Prune the visited block and yield each of its linears when it is done.

        Raises:
            NumericsError: A weight or an activation is NaN or inf; layer and sample are named.
        """
        several = self.recipe.steps > 1
        visit.part()
        rows = {linear: self._dealt(visit, linear) for linear in plan.pruned}

        def own(linear: Linear) -> Tensor:
            return read(visit.block, linear, _own(visit, rows[linear]))

        first = {linear: own(linear) for linear in plan.pruned if several}
        for step in range(1, self.recipe.steps + 1):
            last = step == self.recipe.steps
            for linears, stats in self._gather(visit, plan, last=last):
                began = time.perf_counter()
                dense = {linear: own(linear) for linear in linears}
                facts = self._prune(visit, dense, rows, stats, step)
                seconds = time.perf_counter() - began
                for linear in linears if last else ():
                    began = time.perf_counter()
                    weight = first.get(linear, dense[linear])
                    outcome = self._outcome(visit, linear, weight, rows[linear], stats)
                    share = linear.size / sum(other.size for other in linears)
                    outcome.entry["seconds"] = share * seconds + time.perf_counter() - began
                    outcome.entry.update(facts.get(linear.name, {}))
                    yield outcome

    def _gather(
        self, visit: Visit, plan: Block, *, last: bool
    ) -> Iterator[tuple[Sequence[Linear], Gathered]]:
        """Give the linears of each stage with their statistics when they are to be pruned."""
        stages, needs = plan.pruned_stages, self.recipe.needs
        if self.recipe.propagation == "block" or not needs:
            yield from gather(visit, stages, needs)
        elif self.at_once:
            yield from gather_at_once(visit, stages, needs, last=last)
        else:
            for stage in stages:
                yield from gather(visit, [stage], needs)

    def _dealt(self, visit: Visit, linear: Linear) -> Parts:
        return dealt(self.recipe.pattern, visit.ranks, linear.outputs, linear.inputs)

    def _share(self, visit: Visit, linear: Linear, rows: Parts) -> tuple[Pattern, Rows | None]:
        """Return by what pattern this rank prunes its rows of a linear, and which they are."""
        pattern, ranks = self.recipe.pattern, visit.ranks
        if rows is None:
            return pattern, None
        pattern = spread(pattern, ranks, linear.outputs, linear.inputs)
        return pattern, Rows(rows[ranks.rank].start, linear.outputs, ranks)

    @torch.no_grad()
    def _prune(
        self,
        visit: Visit,
        dense: Mapping[Linear, Tensor],
        rows: Mapping[Linear, Parts],
        stats: Gathered,
        step: int,
    ) -> dict[str, dict[str, float]]:
        """Prune the linears of a stage in place; ``dense``, their weights, is left as it is.

        ``rows``: those of each linear that each rank has in its ``dense``; None for all.
        """
        layers: dict[Linear, Layer] = {}
        for linear, weight in dense.items():
            if (sparsity := self.recipe.sparsity(step, self.sparsities[linear.name])) > 0:
                pattern, held = self._share(visit, linear, rows[linear])
                weight = aim(weight, stats) if self.recipe.beside else weight  # noqa: PLW2901
                layers[linear] = Layer(linear.name, weight, stats, pattern, sparsity, held)
        pruned = self.recipe.method.prune_together([*layers.values()])
        if self.recipe.refine:
            pruned = [*map(refine, layers.values(), pruned)]
        for linear, found in zip(layers, pruned, strict=True):
            module = visit.block.get_submodule(linear.path)
            weight = found.weight.to(self.dtypes[linear.name])
            if parts := rows[linear]:
                weight = visit.ranks.join(weight, parts)
            module.weight.copy_(weight.T if orientation(module)[2] else weight)  # pyright: ignore
        return {
            layer.name: found.facts for layer, found in zip(layers.values(), pruned, strict=True)
        }

    @torch.no_grad()
    def _outcome(
        self, visit: Visit, linear: Linear, dense: Tensor, rows: Parts, stats: Gathered
    ) -> Outcome:
        weight = read(visit.block, linear, _own(visit, rows))
        zeros = (weight == 0).sum()[None]
        ranks = visit.ranks if rows else ALONE
        ranks.add(zeros, "errors")
        entry = {
            "name": linear.name,
            "shape": [linear.outputs, linear.inputs],
            "sparsity": int(zeros) / linear.size,
            "relative_error": relative_error(dense, weight, stats, ranks),
        }
        stored = visit.block.get_submodule(linear.path).weight  # pyright: ignore
        return Outcome(linear, stored.to(self.dtypes[linear.name], copy=True).cpu(), entry)  # pyright: ignore


def _own(visit: Visit, rows: Parts) -> slice:
    """Return the rows that this rank prunes."""
    return rows[visit.ranks.rank] if rows else slice(None)


@torch.no_grad()
def read(block: nn.Module, linear: Linear, rows: slice = slice(None)) -> Float[Tensor, "O I"]:
    """Return a float32 copy of a linear's weight, outputs first, or of some of its rows.

    Raises:
        NumericsError: It holds NaN or inf, in whatever row.
    """
    module = block.get_submodule(linear.path)
    weight = cast("Tensor", module.weight).detach()
    # One sum tells; to look at each entry takes several times as long.
    sound = weight.sum(dtype=torch.float32).isfinite()
    if not sound and (count := int((~weight.isfinite()).sum())):
        raise NumericsError(f"{linear.name}: {count} of its weights are NaN or inf.")
    if orientation(module)[2]:
        return weight.T[rows].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return weight[rows].to(torch.float32, copy=True)


def relative_error(
    dense: Float[Tensor, "O I"],
    pruned: Float[Tensor, "O I"],
    stats: Gathered,
    ranks: Ranks = ALONE,
) -> float | None:
    """Return ‖WX − W′X‖² / ‖WX‖² from the Gram matrix, or None where none was gathered.

    ``ranks`` have the other rows.
    """
    gram = next((statistic.full for statistic in stats if isinstance(statistic, Gram)), None)
    if gram is None:
        return None
    sums = torch.stack([_energy(dense, gram), _energy(dense - pruned, gram)])
    ranks.add(sums, "errors")
    energy, loss = sums.tolist()
    return max(loss, 0.0) / energy if energy > 0 else 0.0


def _energy(weight: Float[Tensor, "O I"], gram: Float[Tensor, "I I"]) -> Float[Tensor, ""]:
    """Return ‖WX‖², panel by panel of columns; what panels share counts twice and is done once."""
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, weight.shape[1], ENERGY_PANEL):
        panel, end = weight[:, start : start + ENERGY_PANEL], start + ENERGY_PANEL
        product = panel @ gram[start:end, start:end]
        product.addmm_(weight[:, end:], gram[end:, start:end], alpha=2)
        total += product.mul_(panel).sum(dtype=torch.float64)
    return total


def gather(
    visit: Visit, stages: Sequence[Sequence[Linear]], needs: Sequence[type[Statistic]]
) -> Iterator[tuple[Sequence[Linear], Gathered]]:
    """Gather ``needs`` for each stage in one forward, then give the stages with their own.

    Raises:
        NumericsError: The input of a linear is NaN or inf in some sample.
    """
    found = [_empty(visit, linears, needs) for linears in stages]
    if needs and stages:
        _observe(visit, stages, found)
    for linears, statistics in zip(stages, found, strict=True):
        yield linears, _checked(visit, linears, statistics)


def gather_at_once(
    visit: Visit,
    stages: Sequence[Sequence[Linear]],
    needs: Sequence[type[Statistic]],
    *,
    last: bool,
) -> Iterator[tuple[Sequence[Linear], Gathered]]:
    """Give each stage with statistics that saw the pruned ones before it, in one forward in all.

    With ``last`` what the pruned block gives takes the place of the hidden states.
    """
    with ExitStack() as stack:
        steps, halts = _in_step(visit, stages, stack)
        apart, others = _in_step(visit.dense, stages, stack) if visit.dense else (None, None)
        for number, inputs in halts:
            statistics = _empty(visit, stages[number], needs)
            dense = next(others)[1] if others else []
            while inputs:
                _update(statistics, inputs.pop(0), dense.pop(0) if dense else None)
            yield stages[number], _checked(visit, stages[number], statistics)
        if apart and others:
            next(others, None)  # on to the end
    if last:
        visit.hidden[:] = steps.outputs
        visit.onward = False
        if apart and visit.dense:
            visit.dense.hidden[:] = apart.outputs
            visit.dense.onward = False


def _in_step(
    visit: Visit, stages: Sequence[Sequence[Linear]], stack: ExitStack
) -> tuple[Lockstep, Iterator[tuple[int, list[Tensor]]]]:
    """Return the forwards of a visited block and their halts, to which ``stack`` puts an end."""
    steps = Lockstep(list(visit.calls()))
    modules = [[visit.block.get_submodule(linear.path) for linear in linears] for linears in stages]
    return steps, stack.enter_context(closing(steps.stages(modules)))


def _empty(
    visit: Visit, linears: Sequence[Linear], needs: Sequence[type[Statistic]]
) -> tuple[Statistic, ...]:
    return tuple(kind(linears[0].inputs, visit.hidden[0].device) for kind in needs)


def _update(
    statistics: tuple[Statistic, ...],
    x: Float[Tensor, "... I"],
    dense: Float[Tensor, "... I"] | None = None,
) -> None:
    for statistic in statistics:
        if isinstance(statistic, Cross) and dense is not None:
            statistic.update_pair(x.flatten(0, -2), dense.flatten(0, -2))
        else:
            statistic.update(x.flatten(0, -2))


def _checked(
    visit: Visit, linears: Sequence[Linear], statistics: tuple[Statistic, ...]
) -> Gathered:
    visit.ranks.merge(statistics)
    if not all(statistic.finite() for statistic in statistics):
        raise NumericsError(_blame(visit, linears[0]))
    return Gathered(statistics)


def survey(
    visits: Callable[[], Iterator[tuple[Visit, Block]]], allocation: Allocation, pattern: Pattern
) -> Survey:
    """Return walks over the dense model for an allocation that looks at it."""
    needs = union(allocation.needs)

    def walk_once() -> Iterator[list[Layer]]:
        for visit, block in visits():
            visit.onward = bool(needs)
            yield [
                Layer(linear.name, read(visit.block, linear), stats, pattern, 0.0)
                for linears, stats in gather(visit, block.pruned_stages, needs)
                for linear in linears
            ]

    return walk_once


def _observe(
    visit: Visit, stages: Sequence[Sequence[Linear]], found: Sequence[tuple[Statistic, ...]]
) -> None:
    read: dict[int, Tensor] = {}  # what the dense model's stages read, of the batch at hand
    with ExitStack() as stack:
        for number, (linears, statistics) in enumerate(zip(stages, found, strict=True)):
            path = linears[0].path

            def update(_: nn.Module, inputs: tuple, of: tuple = (number, statistics)) -> None:
                _update(of[1], inputs[0], read.pop(of[0], None))

            def note(_: nn.Module, inputs: tuple, number: int = number) -> None:
                read[number] = inputs[0]

            for stream, look in ((visit, update), (visit.dense, note)):
                if stream:
                    module = stream.block.get_submodule(path)
                    stack.callback(module.register_forward_pre_hook(look).remove)
        for stream in filter(None, (visit, visit.dense)):
            for linear in stages[-1]:
                module = stream.block.get_submodule(linear.path)
                stack.enter_context(_silent(module, linear.outputs))
        visit.forward()


class _silent:  # noqa: N801  used as a context
    """Spares a linear its product: nothing that is observed depends on the last stage's output."""

    def __init__(self, module: nn.Module, outputs: int) -> None:
        self.module, self.outputs = module, outputs

    def __enter__(self) -> None:
        self.module.forward = lambda x: x.new_zeros(1).expand(*x.shape[:-1], self.outputs)

    def __exit__(self, *_: object) -> None:
        del self.module.forward


def _blame(visit: Visit, linear: Linear) -> str:
    """Say in which sample the input of ``linear`` is not finite; run only after it was found so."""
    broken: list[bool] = []
    module = visit.block.get_submodule(linear.path)

    def look(_: nn.Module, inputs: tuple) -> None:
        samples = (~inputs[0].isfinite()).view(-1, visit.hidden[0].shape[1] * linear.inputs)
        broken.extend(samples.any(1).tolist())

    hook = module.register_forward_pre_hook(look)
    visit.forward()
    hook.remove()
    # Ranks have the samples in their order.
    broken = [sample for samples in visit.ranks.exchange(broken) for sample in samples]
    if True in broken:
        return f"{linear.name}: its input is NaN or inf in calibration sample {broken.index(True)}."
    return f"{linear.name}: the squares of its inputs overflow float32."
