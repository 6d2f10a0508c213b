"""Block influence: blocks that hardly turn the hidden state go first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

from typing_extensions import override

from prunekit.models.units.kinds import Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from prunekit.models.units.blocks import Depth, Output


class BlockInfluence(Ranker):
    """``1 − E cos(x, block(x))``, mean over tokens (Men et al. 2024, ShortGPT).

    Source: arXiv:2403.03853, eq. 1. A block that is gated off has none.
    """

    name: ClassVar[str] = "block-influence"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"blocks"})

    @override
    def score(self, subject: GatedModel) -> Scores:
        import torch

        from prunekit.structured.batches import run_hooked, valid_tokens

        found = cast("list[Depth]", subject.sites)
        # Of each block the sum over tokens, and how many they are.
        sums = {
            place.name: torch.zeros(place.units, 2, dtype=torch.float64, device=place.device)
            for place in found
        }
        for batch in subject.batches:
            handles = [
                block.register_forward_hook(_adding(row, valid), with_kwargs=True)
                for place in found
                for valid in [valid_tokens(batch, decodes=place.stack.reads is not None)]
                for block, row in zip(place.blocks, sums[place.name], strict=True)
            ]
            run_hooked(subject.model, batch, handles)
        subject.add(sums.values())
        return {
            name: (total[:, 0] / total[:, 1].clamp_min(1)).cpu() for name, total in sums.items()
        }


def _adding(row: Tensor, valid: Tensor | None) -> Callable[..., None]:
    from torch.nn.functional import cosine_similarity

    from prunekit.models.units.blocks import passage

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Output) -> None:
        read, gave = passage(args, kwargs, output)
        turned = 1 - cosine_similarity(read.double(), gave.double(), dim=-1)
        turned = turned.flatten() if valid is None else turned[valid]
        row[0] += turned.sum()
        row[1] += turned.numel()

    return hook
