"""Random changes of files that readers must refuse or read correctly."""

import json
import random
import string
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

from prunekit.checkpoint.header import DTYPES
from tests.support import payloads, readers

Chance = random.Random
NAMES = """
    dtype shape data_offsets __metadata__ weight_map metadata weight norm.weight 2:4 bitmask dense
    quantization_config sparsity_config quant_method prunekit format linears
    ../x.safetensors /etc/passwd model.safetensors .
"""
WORDS = (*NAMES.split(), *DTYPES, "", "\0", "x" * 5000)
NUMBERS = (-1, 0, 1, 2, 3, 4, 8, 64, 2**31, 2**62, 2**63, 2**64, 2**200, 0.5, 1e308, float("nan"))
ODD: tuple[Any, ...] = (None, True, False, [], {}, [[]], *NUMBERS, *WORDS)
TOKENS = """
    [prune] [[model]] [a.b] [ ]] = " ''' { } # é \\u nan -inf 1e999 2020-01-01 true -1 0.5 "x" []
    "2:4" ["heads"] {a=1} a.b.c=1
"""
PIECES = (*TOKENS.split(), '""' + '"', "\0", "\r", "9" * 5000, "[" * 2000)


def table_changed(content: bytes, chance: Chance) -> bytes:
    """Mutate some values of a JSON text, or of ``{}`` if invalid."""
    try:
        tree = [json.loads(content)]
        return _changed(tree, chance)
    except (ValueError, RecursionError):
        return _changed([{}], chance)


def _changed(tree: list, chance: Chance) -> bytes:
    for _ in range(chance.choice((1, 1, 2, 4))):
        owner, key = chance.choice([*_places(tree)])
        if chance.random() < 0.2 and isinstance(owner, dict):
            owner[chance.choice(WORDS)] = owner.pop(key)
        elif chance.random() < 0.2:
            del owner[key]
            tree = tree or [{}]
        elif chance.random() < 0.3:
            other, place = chance.choice([*_places(tree)])
            owner[key] = deepcopy(other[place])
        elif isinstance(inner := owner[key], dict | list) and chance.random() < 0.5:
            _add(inner, chance)
        else:
            owner[key] = deepcopy(chance.choice(ODD))
    return json.dumps(tree[0]).encode()


def _add(inner: dict | list, chance: Chance) -> None:
    odd = deepcopy(chance.choice(ODD))
    if isinstance(inner, dict):
        inner[chance.choice(WORDS)] = odd
    else:
        inner.insert(chance.randint(0, len(inner)), odd)


def _places(tree: dict | list) -> Iterator[tuple[Any, Any]]:
    """Yield each pair of container and key within a tree."""
    waiting = [tree]
    while waiting:
        owner = waiting.pop()
        for key, value in owner.items() if isinstance(owner, dict) else enumerate(owner):
            yield owner, key
            if isinstance(value, dict | list):
                waiting.append(value)


def framed_changed(content: bytes, chance: Chance) -> bytes:
    """Mutate a safetensors header; its length field is mostly kept correct."""
    length = int.from_bytes(content[:8], "little")
    table, data = content[8 : 8 + length], content[8 + length :]
    table = table_changed(table, chance)
    claimed = chance.choice(NUMBERS) if chance.random() < 0.1 else len(table)
    return readers.framed(table, int(claimed) % 2**64 if claimed == claimed else 0, data)  # noqa: PLR0124


def lines_changed(content: bytes, chance: Chance) -> bytes:
    """Mutate some lines of a TOML text."""
    lines = content.decode(errors="replace").splitlines() or [""]
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(lines))
        name, equals, _ = lines[at].partition("=")
        match chance.randrange(5):
            case 0:
                lines[at] = f"{name}= {chance.choice(PIECES)}"
            case 1:
                lines[at] = f"{chance.choice(string.ascii_letters)}{equals or '='}{lines[at]}"
            case 2:
                lines.insert(at, chance.choice((*lines, *PIECES)))
            case 3:
                lines[at] = lines[at].removeprefix("# ")
            case _:
                lines[at : at + 1] = []
                lines = lines or [""]
    return "\n".join(lines).encode()


def payload_changed(reader: str, content: bytes, chance: Chance) -> bytes:
    """Mutate a file of compressed parts: its values, bits and offsets, or its header.

    Args:
        reader: Name of the reader.
        content: The file.
        chance: Source of randomness.
    """
    draw = chance.random()
    if draw < 0.05:
        return payloads.random_file(reader, chance)
    return framed_changed(content, chance) if draw < 0.2 else payloads.changed(content, chance)


def state_changed(content: bytes, chance: Chance) -> bytes:
    """Mutate some bytes of a safetensors file's tensors, or its header."""
    if chance.random() < 0.5:
        return framed_changed(content, chance)
    begin = min(8 + int.from_bytes(content[:8], "little"), len(content))
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at, count = chance.randrange(begin, len(changed) + 1), chance.choice((1, 4))
        changed[at : at + count] = bytes([chance.choice((0, 1, 2, 127, 255))]) * count
    return bytes(changed[: len(content)])


CHANGES: dict[str, Callable[[bytes, Chance], bytes]] = {
    "header": framed_changed,
    "index": table_changed,
    "model_config": table_changed,
    "model": table_changed,
    "config": lines_changed,
    "gates": state_changed,
    "pruner": state_changed,
    **{name: partial(payload_changed, name) for name in payloads.READERS},
}
"""How the input of each reader is changed."""
