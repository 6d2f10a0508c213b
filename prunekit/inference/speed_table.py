"""Table of the fastest kernels per GPU and layer shape.

``prunekit bench`` writes it to the user's cache folder; sparse layers read it when they are moved
to a GPU.
"""

import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class KernelChoice:
    """Fastest kernels for a layer of one shape on one device.

    Attributes:
        max_kernel_tokens: Largest number of tokens for which our own kernel was fastest.
        semi_structured: Whether, for more tokens, torch's semi-structured product was faster than
            expanding the weight.
        max_faster_tokens: Largest number of tokens for which the fastest sparse product was faster
            than a dense layer.
    """

    max_kernel_tokens: int
    semi_structured: bool = False
    max_faster_tokens: int = 0

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Self:
        """Return the choice stored in an entry of the table."""
        return cls(entry["reach"], entry.get("semi", False), entry.get("pays", 0))

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the table."""
        return {
            "reach": self.max_kernel_tokens,
            "semi": self.semi_structured,
            "pays": self.max_faster_tokens,
        }


def describe(device: str, layers: Collection[str]) -> str:
    """Describe the speed of sparse layers on a device, for a report.

    Args:
        device: Name of the GPU, or "CPU".
        layers: Table keys of the layer shapes in the model.
    """
    if device == "CPU":
        return (
            "A CPU expands each weight and multiplies it dense, at every call: memory is saved, "
            "time is not."
        )
    choices = [choice for layer in sorted(layers) if (choice := look_up(device, layer))]
    if not choices:
        return f"Nothing was measured on {device}: prunekit bench --model does, and says what pays."
    slow = sum(choice.max_faster_tokens == 0 for choice in choices)
    kernel_tokens = _span(choice.max_kernel_tokens for choice in choices)
    faster_tokens = _span(choice.max_faster_tokens for choice in choices)
    parts = [
        f"Of {len(layers)} layer shapes {len(choices)} were measured on {device}: our kernel takes "
        f"up to {kernel_tokens} tokens, with more the product is {_beyond(choices)}; faster than "
        f"dense up to {faster_tokens} tokens"
    ]
    if slow:
        parts.append(f"{slow} of them never: there --format dense is faster")
    return ", ".join(parts) + "."


def _span(counts: Iterable[int]) -> str:
    ordered = sorted(counts)
    low, high = ordered[0], ordered[-1]
    return str(high) if low == high else f"{high} (only {low} in some)"


def _beyond(choices: list[KernelChoice]) -> str:
    semi = sum(choice.semi_structured for choice in choices)
    if semi == len(choices):
        return "torch's semi-structured one"
    if semi == 0:
        return "dense, with the weight expanded for the moment"
    return f"torch's semi-structured one in {semi} and dense, expanded for the moment, elsewhere"


def table_file() -> Path:
    """Return the path of the table."""
    cache_folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_folder) / "prunekit" / "speed.json"


def layer_key(kind: str, dtype: str, outputs: int, inputs: int) -> str:
    """Return the table key of a layer.

    Args:
        kind: Name of the format.
        dtype: Name of the dtype.
        outputs: Output features.
        inputs: Input features.
    """
    return f"{kind} {dtype} {outputs}x{inputs}"


def look_up(device: str, layer: str) -> KernelChoice | None:
    """Return the measured choice for a layer on a device, or None."""
    entry = _table(table_file()).get(device, {}).get(layer)
    return None if entry is None else KernelChoice.from_json(entry)


def save(device: str, choices: dict[str, KernelChoice]) -> Path:
    """Add choices for a device to the table; return its path."""
    file = table_file()
    table = dict(_read(file))
    table[device] = table.get(device, {}) | {layer: c.to_json() for layer, c in choices.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    temporary.replace(file)
    _table.cache_clear()
    return file


@cache
def _table(file: Path) -> dict[str, Any]:
    return _read(file)


def _read(file: Path) -> dict[str, Any]:
    """Return the table, empty if it cannot be read."""
    try:
        table = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}
