"""Checks which settings exclude quantization of the output."""

from collections.abc import Mapping
from typing import Any

AFTERWARDS = "Leave it out, then quantize the result: prunekit quantize."


def quantize_mistake(storage: str, tables: Mapping[str, Any]) -> str | None:
    """Return why weights cannot be quantized in this run, or None.

    Args:
        storage: Storage format of ``[output]``.
        tables: The other tables of the config that are valid, by name.
    """
    if storage != "dense":
        return (
            f'goes with format "dense", not "{storage}": compressed-tensors stores the codes of '
            "all weights, zeros among them."
        )
    if training := next((f"[{name}]" for name in ("train", "apt") if tables.get(name)), None):
        return f"does not go with {training}, which trains weights after pruning. {AFTERWARDS}"
    prune = tables.get("prune")
    if recover := getattr(prune, "recover", None):
        # An adapter lies beside the weights that it corrects, which are not rounded then.
        instead = "Leave one of them out." if recover == "lowrank" else AFTERWARDS
        return (
            f'does not go with prune.recover = "{recover}", which changes the model after its '
            f"weights are rounded. {instead}"
        )
    return None
