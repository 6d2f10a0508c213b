"""What was measured of sparse layers on each GPU: a small table beside the user's caches.

``prunekit bench`` fills it; sparse layers read it once, when they come to a GPU.
"""

import json
import os
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Choice:
    """How a layer of one shape multiplies on one device.

    Attributes:
        reach: The most tokens for which our own kernel was fastest.
        semi: With more tokens, torch's semi-structured product was faster than expanding.
    """

    max_kernel_tokens: int
    semi: bool = False
    max_faster_tokens: int = 0
    """The most tokens for which the fastest sparse way beat a dense layer."""


def describe(device: str, layers: Collection[str]) -> str:
    """Return one sentence for a report: how layers multiply on a device, as far as was measured.

    Args:
        device: Its name; CPU for that.
        layers: Keys of the shapes that occur.
    """
    if device == "CPU":
        return (
            "A CPU expands each weight and multiplies it dense, at every call: memory is saved, "
            "time is not."
        )
    found = [choice for layer in sorted(layers) if (choice := look_up(device, layer))]
    if not found:
        return f"Nothing was measured on {device}: prunekit bench --model does, and says what pays."
    slow = sum(choice.max_faster_tokens == 0 for choice in found)
    parts = [
        f"Of {len(layers)} layer shapes {len(found)} were measured on {device}: our kernel takes "
        f"up to {_span(choice.max_kernel_tokens for choice in found)} tokens, with more the product is "
        f"{_beyond(found)}; faster than dense up to {_span(choice.max_faster_tokens for choice in found)} tokens"
    ]
    if slow:
        parts.append(f"{slow} of them never: there --format dense is faster")
    return ", ".join(parts) + "."


def _span(counts: Iterable[int]) -> str:
    found = sorted(counts)
    low, high = found[0], found[-1]
    return str(high) if low == high else f"{high} (only {low} in some)"


def _beyond(found: list[Choice]) -> str:
    semi = sum(choice.semi for choice in found)
    if semi == len(found):
        return "torch's semi-structured one"
    if semi == 0:
        return "dense, with the weight expanded for the moment"
    return f"torch's semi-structured one in {semi} and dense, expanded for the moment, elsewhere"


def table_file() -> Path:
    """Return where the table is."""
    cache_folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_folder) / "prunekit" / "speed.json"


def key(kind: str, dtype: str, outputs: int, inputs: int) -> str:
    """Return what a layer is called in the table of a device."""
    return f"{kind} {dtype} {outputs}x{inputs}"


def look_up(device: str, layer: str) -> Choice | None:
    """Return what was measured of a layer on a device, or None if nothing was."""
    found = _table(table_file()).get(device, {}).get(layer)
    return None if found is None else Choice(**found)


def save(device: str, found: dict[str, Choice]) -> Path:
    """Add what was measured on a device to the table, and return where that is."""
    file = table_file()
    table = dict(_read(file))
    table[device] = table.get(device, {}) | {layer: asdict(c) for layer, c in found.items()}
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
    """Return the table; a cache that cannot be read is as good as none."""
    try:
        table = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}
