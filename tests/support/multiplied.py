"""Wanda masks computed without prunekit, from every product with a weight in a stock model.

Shapes: O output features, I input features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Products(TorchDispatchMode):
    """Collects the squared norms of the inputs that are multiplied with each matrix.

    Attributes:
        energies: Sums by name of the parameter, offset in it, and shape and strides [I, O].
    """

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.energies: dict[tuple[Any, ...], Tensor] = {}
        self._spans = {
            name: (value.data_ptr(), value.data_ptr() + value.nbytes, value.element_size())
            for name, value in parameters.items()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, matmuls = func.overloadpacket, torch.ops.aten
        if packet is matmuls.mm:
            self._note(*args[:2])
        elif packet is matmuls.addmm:
            self._note(*args[1:3])
        return func(*args, **(kwargs or {}))

    def _note(self, x: Tensor, weight: Tensor) -> None:
        at = weight.data_ptr()
        for name, (start, end, size) in self._spans.items():
            if start <= at < end:
                key = name, (at - start) // size, tuple(weight.shape), weight.stride()
                energy = x.double().square().sum(0)
                self.energies[key] = self.energies.get(key, 0) + energy


def wanda_mistakes(dense: Any, pruned: Any, blocks: list[str], ids: Tensor) -> list[str]:
    """Return parameters of blocks whose mask is not that of Wanda at 50 %, or has no product.

    Args:
        dense: The dense stock model; its blocks are replaced by pruned ones.
        pruned: The pruned stock model.
        blocks: Names of the blocks in run order.
        ids: Calibration tokens.
    """
    before, after = dict(dense.named_parameters()), dict(pruned.named_parameters())
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    found = [name for name in changed if not name.startswith(tuple(f"{name}." for name in blocks))]
    for block in blocks:
        inside = {name: before[name] for name in changed if name.startswith(f"{block}.")}
        with torch.no_grad(), Products(inside) as products:
            dense(input_ids=ids)
        seen = set()
        for (name, offset, shape, stride), energy in products.energies.items():
            seen.add(name)
            at = [
                torch.as_strided(
                    each[name].detach(), shape, stride, each[name].storage_offset() + offset
                ).T
                for each in (before, after)
            ]
            if not _is_wanda(*at, energy):
                found.append(f"{name} + {offset}")
        found += sorted(inside.keys() - seen)
        with torch.no_grad():
            for name, weight in inside.items():
                weight.copy_(after[name])
    return found


def _is_wanda(weight: Tensor, pruned: Tensor, energy: Tensor) -> bool:
    """Return whether half of each row is kept, by |W|‖X‖, except of scores that are close."""
    score, count = weight.abs().double() * energy.sqrt(), weight.shape[1] // 2
    ordered = score.sort(1).values
    middle = ordered[:, count - 1 : count + 1].mean(1, keepdim=True)
    keep = pruned != 0
    unclear = (score - middle).abs() <= 1e-4 * middle
    right = ((score > middle) == keep) | unclear
    counted = (~keep).sum(1) == count
    return bool(right.all() and counted.all() and torch.equal(pruned[keep], weight[keep]))
