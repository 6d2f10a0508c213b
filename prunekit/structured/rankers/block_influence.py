"""Block influence: prune blocks that hardly rotate the hidden states first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

from typing_extensions import override

from prunekit.models.units.kinds import Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from prunekit.models.units.blocks import BlockGroup, BlockOutput


class BlockInfluence(Ranker):
    """``1 − E cos(x, block(x))``, mean over tokens (Men et al. 2024, ShortGPT).

    Source: arXiv:2403.03853, eq. 1. The score of a closed block is 0.
    """

    name: ClassVar[str] = "block-influence"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"blocks"})

    @override
    def score(self, gated: GatedModel) -> Scores:
        import torch

        from prunekit.structured.batches import run_hooked, valid_tokens

        groups = cast("list[BlockGroup]", gated.groups)
        # For each block the sum over tokens, and their number.
        sums = {
            group.name: torch.zeros(group.units, 2, dtype=torch.float64, device=gated.device)
            for group in groups
        }
        for batch in gated.batches:
            handles = [
                block.register_forward_hook(_accumulate(row, valid), with_kwargs=True)
                for group in groups
                for valid in [valid_tokens(batch, decodes=group.stack.reads is not None)]
                for block, row in zip(group.blocks, sums[group.name], strict=True)
            ]
            run_hooked(gated.forward.run, batch, handles)
        gated.all_reduce_sums(sums.values())
        return {
            name: (total[:, 0] / total[:, 1].clamp_min(1)).cpu() for name, total in sums.items()
        }


def _accumulate(row: Tensor, valid: Tensor | None) -> Callable[..., None]:
    """Return a hook that adds angular distances to ``row``."""
    from torch.nn.functional import cosine_similarity

    from prunekit.models.units.blocks import block_input_output

    def hook(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: BlockOutput
    ) -> None:
        x, y = block_input_output(args, kwargs, output)
        distance = 1 - cosine_similarity(x.double(), y.double(), dim=-1)
        distance = distance.flatten() if valid is None else distance[valid.to(x.device)]
        row[0] += distance.sum().to(row.device)
        row[1] += distance.numel()

    return hook
