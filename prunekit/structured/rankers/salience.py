"""Outlier-aware salience: activation times gradient, plus the kurtosis of weights.

Shapes: U units of a group, I inputs of a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from prunekit.models.units.kinds import Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker


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
        from prunekit.structured.probes.unit_readings import unit_readings

        readings = unit_readings(gated.model, gated.groups, outliers=self.outliers)
        modules = [module for reading in readings.values() for module in reading.modules]
        windows = TokenWindows(gated, modules, self.window)
        weights = self.window_weights(windows.tokens)
        totals = {
            group.name: torch.zeros(group.units, dtype=torch.float64) for group in gated.groups
        }
        for number, window in windows:
            for state in window.states:
                state[6:8] /= max(window.predictions, 1.0)
            states = iter(window.states)
            for name, reading in readings.items():
                own = islice(states, len(reading.modules))
                totals[name] += weights[number] * reading.score(own, self.window, self.product)
        gated.all_reduce_sums(totals.values())
        return totals

    def window_weights(self, tokens: Sequence[int]) -> list[float]:
        """Return the weight of each window in the mean, given its tokens."""
        if not self.smoothing:
            return [count / max(sum(tokens), 1) for count in tokens]
        last = len(tokens) - 1
        decays = [self.smoothing ** (last - number) for number in range(len(tokens))]
        return [decays[0], *((1 - self.smoothing) * decay for decay in decays[1:])]
