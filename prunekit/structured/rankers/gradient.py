"""Gate gradient: prune units whose gates change the loss least first."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from prunekit.models.units.kinds import KINDS, Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from torch import Tensor


class Gradient(Ranker):
    """``E |∂L/∂ξ|``: mean absolute gradient by the unit's gate ξ.

    The absolute value is taken per sample, since gradients of samples may have opposite signs. L is
    the mean over the predictions of a sample. Source: Michel et al. 2019, arXiv:1905.10650, eq. 2.
    """

    name: ClassVar[str] = "gradient"
    kinds: ClassVar[frozenset[Kind]] = frozenset(KINDS)
    needs_loss: ClassVar[bool] = True

    normalised: bool = False
    """Divide the scores of a layer by their Euclidean norm, as the paper does."""

    @override
    def score(self, gated: GatedModel) -> Scores:
        return self.combine([self.measure(gated)])

    @override
    def measure(self, gated: GatedModel) -> Scores:
        import torch

        from prunekit.models.units.hidden import HiddenGroup

        sums = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in gated.groups}
        signed: dict[str, list[Tensor]] = {
            group.name: [] for group in gated.groups if isinstance(group, HiddenGroup)
        }
        samples = 0
        for batch in gated.batches:
            size = len(batch["input_ids"])
            with ExitStack() as stack:
                # One gate per sample, so that one backward pass yields the gradient of each.
                values = [
                    stack.enter_context(
                        gate.holding(gate.value.detach().repeat(size, 1, 1).requires_grad_())
                    )
                    for gate in (gated.gates[group.name] for group in gated.groups)
                ]
                gradients, predictions = gated.forward.gradients(batch, lambda: values)  # noqa: B023
            weights = 1 / predictions.double().cpu().clamp_min(1)
            for name, gradient in zip(sums, gradients, strict=True):
                each = gradient[:, 0].double().cpu() * weights[:, None]
                if name in signed:
                    signed[name].append(each)
                else:
                    sums[name] += each.abs().sum(0)
            samples += size
        gated.all_reduce_sums(sums.values())
        samples = sum(gated.ranks.all_gather_object(samples))
        means = {name: total / samples for name, total in sums.items()}
        return means | {
            name: torch.cat([*chain(*gated.ranks.all_gather_object(each))])
            for name, each in signed.items()
        }

    @override
    def combine(self, measured: Sequence[Scores]) -> Scores:
        (parts,) = measured
        # Those of a coordinate are [N, U], with signs: gradients by its gates at all norms add up.
        scores = {
            name: each.abs().mean(0) if each.ndim > 1 else each for name, each in parts.items()
        }
        if not self.normalised:
            return scores
        return {name: score / score.norm().clamp_min(1e-300) for name, score in scores.items()}
