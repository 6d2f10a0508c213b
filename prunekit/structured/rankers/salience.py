"""Outlier-aware salience: activation times gradient, plus the kurtosis of weights.

Shapes: U units of a group, I inputs of a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from prunekit.models.units.kinds import Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from prunekit.models.units.heads_neurons import LinearUnitGroup
    from prunekit.models.units.hidden import HiddenGroup
    from prunekit.structured.probes.token_windows import Observed, Window


class Salience(Ranker):
    """``(Σ|h|) · (Σ|∂L/∂h|) + √Kurt`` of a unit's output h (Zhao et al., APT, arXiv:2401.12200).

    The sums run over the tokens of a window, padding excepted, each separately (eq. 5); L is the
    mean loss of the window. The score is the mean over all windows: like the authors' code, which
    adds √Kurt in each training batch, since sums over all tokens would outgrow it.

    Heads and neurons: h are the inputs of the one linear that reads the unit, after its gate; the
    products of a head's inputs are added. Kurt is the excess kurtosis of the weights that read the
    unit, each times its mean input in the window, clamped at 0.

    Coordinates of the residual stream: h is the coordinate as each norm reads it, after its gate,
    and the products of all norms are added. √Kurt is added for every linear that reads the norms,
    the output head included: Kurt is that of the linear's weights for the coordinate. (The authors
    take the outputs of the linears that write to the stream: of stories260K Spearman's ρ to
    leave-one-out is then 0.48, with the norms 0.70.)

    A window holds whole samples, and its Σ|h| is scaled to the tokens of a full one. So scores
    depend neither on the batches into which samples are cut nor on the number of ranks.
    """

    name: ClassVar[str] = "salience"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"hidden", "heads", "neurons"})
    needs_loss: ClassVar[bool] = True

    product: Literal["sums", "elements"] = "sums"
    """Product of the two sums; "elements": ``Σ|h g|``."""

    window: int = Field(default=4096, gt=0)
    """Tokens of a window: about those of a training batch of the authors."""

    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """β of a running mean ``S̄ ← β S̄ + (1 − β) S`` over the windows, 0.85 in the authors' code; 0 is
    the mean of all windows."""

    outliers: bool = True
    """False omits the kurtosis."""

    @override
    def score(self, gated: GatedModel) -> Scores:
        import torch

        from prunekit.structured.probes.token_windows import TokenWindows

        readings = _readings(gated, outliers=self.outliers)
        modules = [module for reading in readings.values() for module in reading.modules]
        windows = TokenWindows(gated, modules, self.window)
        weights = self.window_weights(windows.tokens)
        totals = {
            group.name: torch.zeros(group.units, dtype=torch.float64) for group in gated.groups
        }
        for number, window in windows:
            states = iter(window.states)
            for name, reading in readings.items():
                products = [
                    self._module_score(window, next(states), reading) for _ in reading.modules
                ]
                totals[name] += weights[number] * (sum(products) + reading.constant).cpu()
        gated.all_reduce_sums(totals.values())
        return totals

    def _module_score(
        self, window: Window, state: Float[Tensor, "10 I"], reading: _Reading
    ) -> Float[Tensor, " U"]:
        """Return the score of units by one module within a window.

        Args:
            window: The window.
            state: Its sums for the module.
            reading: How the units are read.
        """
        from prunekit_kernels import apt_score

        state = state.to(reading.moments.device, copy=True)
        state[5] *= self.window / state[0].clamp_min(1)
        state[6:8] /= max(window.predictions, 1.0)
        return apt_score(state, reading.moments, width=reading.width, product=self.product)

    def window_weights(self, tokens: Sequence[int]) -> list[float]:
        """Return the weight of each window in the mean, given its tokens."""
        if not self.smoothing:
            return [count / max(sum(tokens), 1) for count in tokens]
        last = len(tokens) - 1
        decays = [self.smoothing ** (last - number) for number in range(len(tokens))]
        return [decays[0], *((1 - self.smoothing) * decay for decay in decays[1:])]


@dataclass(frozen=True)
class _Reading:
    """How the units of a group are read.

    Attributes:
        modules: The modules that read them.
        width: Inputs of a unit.
        moments: Moments of the weights that read them, [10 I]; those of no weight add no kurtosis.
        constant: Added to each window's score, [U].
    """

    modules: list[Observed]
    width: int
    moments: Tensor
    constant: Tensor


def _readings(gated: GatedModel, *, outliers: bool) -> dict[str, _Reading]:
    """Return how each group is read, by its name."""
    from prunekit.models.units.hidden import HiddenGroup

    return {
        group.name: _of_coordinates(gated, group, outliers=outliers)
        if isinstance(group, HiddenGroup)
        else _of_linear(group, outliers=outliers)
        for group in gated.groups
    }


def _of_linear(group: LinearUnitGroup, *, outliers: bool) -> _Reading:
    """Return how heads or neurons are read: by one linear."""
    import torch
    from prunekit_kernels import new_state

    from prunekit.structured.probes.token_windows import Observed

    linear = group.reader.linear
    moments = _moments(linear)
    if not outliers:
        moments = new_state(moments.shape[1], moments.device)
    constant = torch.zeros(group.units, dtype=torch.float64, device=moments.device)
    observed = Observed(linear, group.stack.reads is not None)
    return _Reading([observed], group.features_per_unit, moments, constant)


def _of_coordinates(gated: GatedModel, group: HiddenGroup, *, outliers: bool) -> _Reading:
    """Return how coordinates of the residual stream are read: by the norms."""
    import torch
    from prunekit_kernels import apt_score, new_state

    from prunekit.architectures import find_architecture
    from prunekit.architectures.coverage import LINEAR_TYPES
    from prunekit.models.orientation import stored_axis
    from prunekit.structured.probes.token_windows import Observed

    decoders = {
        module
        for stack in find_architecture(gated.model).stacks
        if stack.reads is not None
        for module in gated.model.base_model.get_submodule(stack.module).modules()
    }
    constant = torch.zeros(group.units, dtype=torch.float64, device=group.device)
    for axis in group.axes if outliers else ():
        if isinstance(axis.module, LINEAR_TYPES) and axis.axis == stored_axis(axis.module, 1):
            constant += apt_score(_moments(axis.module), None)
    norms = [Observed(norm, norm in decoders) for norm in dict.fromkeys(group.norms)]
    return _Reading(norms, 1, new_state(group.units, group.device), constant)


def _moments(linear: nn.Module) -> Float[Tensor, "10 I"]:
    """Return the moments of the weights of each input."""
    from prunekit_kernels import weight_moments

    from prunekit.models.adapters import effective_weight

    return weight_moments(effective_weight(linear).float())
