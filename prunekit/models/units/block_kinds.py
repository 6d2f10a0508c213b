"""Checks that a config with fewer blocks preserves the kinds of blocks.

Both models are stock ones, built from the config with all blocks and from the one with the kept
blocks, so that they differ in nothing but the numbers of their blocks.
"""

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from prunekit.errors import ShapeError

WAY_OUT = "Blocks of this model cannot be taken out."
SCALARS = (bool, int, float, str, type(None))


def check_same_blocks(
    name: str,
    whole: nn.ModuleList,
    fewer: nn.ModuleList,
    keep: Sequence[int],
    shared: Set[tuple[str, str]],
) -> None:
    """Refuse a config whose blocks differ from the kept ones.

    Args:
        name: Full name of the list of blocks.
        whole: All blocks.
        fewer: The blocks of a stock model with the kept ones.
        keep: Numbers of the kept blocks, in their new order.
        shared: Module and name of the parameters that only the first block has, on behalf of all.

    Raises:
        ShapeError: Names the first difference.
    """
    if len(fewer) != len(keep):
        raise ShapeError(
            f"{name}: the config makes {len(fewer)} blocks of it, not {len(keep)}. {WAY_OUT}"
        )
    for place, unit in enumerate(keep):
        where = f"{name}.{unit}"
        _check_parameters(where, whole[unit], fewer[place], {".".join(each) for each in shared})
        modules = dict(fewer[place].named_modules())
        for path, module in whole[unit].named_modules():
            first_only = path in {owner for owner, _ in shared}
            _check_values(f"{where}.{path}", module, modules[path], (unit, place), first_only)


def check_same_rest(whole: PreTrainedModel, fewer: PreTrainedModel, lists: Sequence[str]) -> None:
    """Refuse a config that changes parameters outside of the blocks.

    Args:
        whole: Stock model with all blocks.
        fewer: Stock model with the kept blocks.
        lists: Full names of the lists of blocks.

    Raises:
        ShapeError: Names the first such parameter.
    """
    inside = tuple(f"{name}." for name in lists)
    before, after = (
        {name: [*p.shape] for name, p in model.named_parameters() if not name.startswith(inside)}
        for model in (whole, fewer)
    )
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            raise ShapeError(
                f"{name}: is {before.get(name, 'absent')} with all blocks, and "
                f"{after.get(name, 'absent')} in a stock model with fewer. {WAY_OUT}"
            )


def token_counters(model: PreTrainedModel) -> list[int] | None:
    """Return the blocks by which transformers counts the tokens in its cache.

    Blocks with linear attention or convolutions do not count them. None for a family whose blocks
    are all alike.
    """
    config: Any = model.config
    if not config.is_encoder_decoder:  # whose stacks have entries of one config
        config = config.get_text_config()
    if getattr(config, "layer_types", None) is None:
        return None
    layers = DynamicCache(config=config).layers
    return [unit for unit, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)]


def check_counts_tokens(whole: PreTrainedModel, fewer: PreTrainedModel) -> None:
    """Refuse to remove all blocks by which transformers counts tokens.

    Args:
        whole: Stock model with all blocks.
        fewer: Stock model with the kept blocks.

    Raises:
        ShapeError: No block with attention would be left.
    """
    if token_counters(whole) and not token_counters(fewer):
        raise ShapeError(
            f"blocks: no block with attention would be left, and transformers cannot run a model "
            f"of type {whole.config.model_type!r} without one. Remove fewer."
        )


def adopt_numbers(block: nn.Module, whole: nn.Module, fewer: nn.Module) -> None:
    """Set the numbers of a block that depend on its place.

    An example is ``layer_idx``.

    Args:
        block: The block that has moved.
        whole: The block in a stock model with all blocks.
        fewer: The block in a stock model with the kept ones.
    """
    modules = dict(fewer.named_modules())
    for path, module in whole.named_modules():
        after = vars(modules[path])
        for key, value in vars(module).items():
            if isinstance(value, int) and value != after[key]:
                setattr(block.get_submodule(path), key, after[key])


def _check_parameters(where: str, block: nn.Module, fewer: nn.Module, shared: Set[str]) -> None:
    before, after = (
        {path: [*p.shape] for path, p in each.named_parameters() if path not in shared}
        for each in (block, fewer)
    )
    if differ := before.keys() ^ after.keys():
        raise ShapeError(
            f"{where}.{min(differ)}: not every block has it, and in its new place a stock model "
            f"wants the other kind. {WAY_OUT}"
        )
    for path, shape in before.items():
        if shape != after[path]:
            raise ShapeError(
                f"{where}.{path}: has shape {shape}, and in its new place a stock model wants "
                f"{after[path]}. {WAY_OUT}"
            )


def _check_values(
    where: str,
    module: nn.Module,
    fewer: nn.Module,
    places: tuple[int, int],
    first_only: bool,  # noqa: FBT001
) -> None:
    """Compare numbers, names, switches and buffers that no file holds."""
    unit, place = places
    after = vars(fewer)
    for key, value in vars(module).items():
        if not isinstance(value, SCALARS) or (first_only and isinstance(value, bool)):
            continue
        expected = after.get(key)
        if value == expected or _moved(value, unit) == _moved(expected, place):
            continue
        raise ShapeError(
            f"{where}: {key} is {value}, and a stock model with fewer blocks gives the block "
            f"{expected} in its new place. {WAY_OUT}"
        )
    for key in module._non_persistent_buffers_set:
        before, now = module._buffers[key], fewer._buffers.get(key)
        if before is not None and (now is None or not torch.equal(before, now)):
            raise ShapeError(
                f"{where}: {key} follows from the place of the block, and a stock model with "
                f"fewer blocks computes another one. {WAY_OUT}"
            )


def _moved(value: Any, place: int) -> Any:  # noqa: ANN401
    """Return a number as counted from the block that has it."""
    return value - place if isinstance(value, int) and not isinstance(value, bool) else value
