"""Salience of units from the training's own forward and backward.

    S = (Σ|h|) (Σ|∂L/∂h|) + √Kurt + Σ|b ∂L/∂b|

of each step, with a running mean S̄ ← β S̄ + (1 − β) S. The first two terms are those of the ranker
:class:`prunekit.structured.rankers.salience.Salience`; the last one adds the adapters' rows and
columns of the unit. Source: Zhao et al., APT, eq. 5 and 9, arXiv:2401.12200.

Shapes: U units of a group, I inputs of a module, R rows of a parameter along an axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from prunekit_kernels import new_state, salience
from torch import Tensor, nn

from prunekit.distributed.weights import sum_over_ranks
from prunekit.errors import NumericsError
from prunekit.models.units.base import UnitGroup
from prunekit.structured.batches import valid_tokens
from prunekit.structured.frozen_units import HookHandles
from prunekit.structured.probes.unit_readings import unit_readings

if TYPE_CHECKING:
    from jaxtyping import Float
    from transformers import PreTrainedModel

    from prunekit.distributed.ranks import Ranks
    from prunekit.structured.rankers import Scores

STEP_TOKENS = 4096
"""Σ|h| is scaled to so many tokens, about those of a training batch of the authors."""


class StepSalience(HookHandles):
    """Hooks that sum activations and gradients of a training step.

    A forward without gradients, such as a teacher's or one of evaluation, is not seen. In a
    checkpointed forward only the first run counts, whose graph the backward follows.

    Attributes:
        groups: The groups that are scored.
    """

    def __init__(
        self, model: PreTrainedModel, groups: Sequence[UnitGroup], *, outliers: bool
    ) -> None:
        """Attach the hooks.

        Args:
            model: The model, whose gates require a gradient.
            groups: Groups of heads, neurons and coordinates.
            outliers: Add the kurtosis of weights.
        """
        self.groups = groups
        self._readings = unit_readings(model, groups, outliers=outliers)
        self._observed = [each for reading in self._readings.values() for each in reading.modules]
        self._masks: dict[bool, Tensor | None] = {}
        self._states: list[Tensor] = []
        self._reset()
        handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for number, each in enumerate(self._observed):
            handles.append(each.module.register_forward_hook(partial(self._forward, number)))
        super().__init__(handles)

    def _reset(self) -> None:
        inputs = [
            reading.moments.shape[1] for reading in self._readings.values() for _ in reading.modules
        ]
        devices = [each.module.weight.device for each in self._observed]  # pyright: ignore
        self._states = [new_state(*each) for each in zip(inputs, devices, strict=True)]  # pyright: ignore

    def _begin(self, _: nn.Module, __: object, batch: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            kinds = {each.decodes for each in self._observed}
            self._masks = {decodes: valid_tokens(batch, decodes=decodes) for decodes in kinds}

    def _forward(self, number: int, _: nn.Module, inputs: tuple[Tensor, ...], __: object) -> None:
        h = inputs[0]
        if torch.is_grad_enabled() and h.requires_grad:
            valid = self._masks[self._observed[number].decodes]
            h.register_hook(partial(self._backward, number, h.detach(), valid))

    def _backward(self, number: int, h: Tensor, valid: Tensor | None, g: Tensor) -> None:
        if not bool(g.any()):
            return  # a rank without samples runs one whose loss counts as 0
        rows = None if valid is None else valid.flatten()
        h, g = h.flatten(0, -2), g.flatten(0, -2)
        salience(h, g, self._states[number], rows, moments=False, products=False)

    def scores(self, adapters: Mapping[nn.Parameter, Tensor], ranks: Ranks) -> Scores:
        """Return the salience of this step, and begin the next.

        Args:
            adapters: Trained matrices of adapters, with the gradient of the step.
            ranks: Processes that share the batch.

        Raises:
            NumericsError: A salience is not finite.
        """
        self._sum_over(ranks)
        states, found = iter(self._states), {}
        for group in self.groups:
            reading = self._readings[group.name]
            own = islice(states, len(reading.modules))
            score = reading.score(own, STEP_TOKENS, "sums") + adapter_salience(group, adapters)
            if not bool(score.isfinite().all()):
                unit = int((~score.isfinite()).nonzero()[0])
                raise NumericsError(
                    f"apt: the salience of {group.name}.{unit} is {float(score[unit])}. Lower "
                    "apt.rate."
                )
            found[group.name] = score
        self._reset()
        return found

    def _sum_over(self, ranks: Ranks) -> None:
        """Add the sums of all ranks: of counts, activations and gradients."""
        if not ranks.is_distributed:
            return
        for state in self._states:
            state[1] *= state[0]  # the sum, instead of the mean
        sum_over_ranks(self._states, ranks, "salience")
        for state in self._states:
            state[1] /= state[0].clamp_min(1)


def adapter_salience(
    group: UnitGroup, adapters: Mapping[nn.Parameter, Tensor]
) -> Float[Tensor, " U"]:
    """Return Σ|b ∂L/∂b| over the adapters' rows and columns of each unit.

    Args:
        group: The units.
        adapters: Matrices of adapters, with their gradients.
    """
    total = torch.zeros(group.units, dtype=torch.float64)
    for parameter, axis, owner in group.parameter_axes:
        if parameter in adapters:
            product = (parameter.detach() * adapters[parameter]).abs()
            rows = product.double().sum([each for each in range(product.ndim) if each != axis])
            total.index_add_(0, owner, rows.cpu())
    return total


class RunningMean:
    """Running mean of scores over steps."""

    def __init__(self, share: float) -> None:
        """``share`` is β, the share of the earlier mean."""
        self._share = share
        self.scores: Scores = {}

    def update(self, scores: Scores) -> None:
        """Add the scores of a step."""
        for name, score in scores.items():
            before = self.scores.get(name)
            mean = score if before is None else before.lerp(score, 1 - self._share)
            self.scores[name] = mean

    def keep(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Keep the scores of some units, by group name."""
        for name in kept.keys() & self.scores.keys():
            self.scores[name] = self.scores[name][[*kept[name]]]
