"""Readers of compressed weights, held against a decoder of its own, bit by bit.

An input is a safetensors file with one compressed layer, whose ``__metadata__`` says how it is
listed in ``config.json``. A reader must return the weight that the decoder returns, or refuse the
file where the decoder does.
"""

import json
import random
from collections.abc import Callable
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from safetensors.torch import save
from torch import Tensor

from prunekit.checkpoint.compressed import compressed_weights
from prunekit.checkpoint.formats import WeightLayout, format_named
from prunekit.checkpoint.header import read_header
from prunekit.checkpoint.reader import Checkpoint, with_compressed
from prunekit.checkpoint.weight_files import WEIGHTS_FILE
from prunekit.errors import CheckpointError
from prunekit.inference.convert import LEGACY, LEGACY_PARTS, open_legacy
from prunekit.inference.sparse_linear import SparseLinear
from tests.support.watched import replace_file, result

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LAYER = "layer"
LARGEST = 2**56
"""Most weights of a layout."""
FEW = 10_000
"""Weights of a layer that is built as a module."""


class Stored(NamedTuple):
    """A tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Dense(NamedTuple):
    """A decoded weight, outputs first."""

    dtype: torch.dtype
    shape: tuple[int, int]
    data: bytes


def two_four(folder: Path, content: bytes) -> None:
    """Read a weight in our format 2:4."""
    _read_own("2:4", folder, content)


def bitmask(folder: Path, content: bytes) -> None:
    """Read a weight in our format bitmask."""
    _read_own("bitmask", folder, content)


def legacy(folder: Path, content: bytes) -> None:
    """Read the weights of a folder of compressed-tensors."""
    table, said = _parsed(content)
    theirs = str(said.get("format"))
    theirs = theirs if theirs in LEGACY else next(iter(LEGACY))
    place = folder / theirs
    if not place.exists():
        place.mkdir()
        config = {"quantization_config": {"sparsity_config": {"format": theirs}}}
        (place / "config.json").write_text(json.dumps(config))
    replace_file(place / WEIGHTS_FILE, content)
    found = result(place, _read_legacy, place)
    readable = _tensors(place) is not None
    expected = _decode_legacy(LEGACY[theirs], table) if readable else None
    assert (found or {}).keys() == (expected or {}).keys(), "opens or refuses another weight"
    for name, weight in (found or {}).items():
        _assert_same(weight, (expected or {})[name])


READERS: dict[str, Callable[[Path, bytes], None]] = {
    reader.__name__: reader for reader in (two_four, bitmask, legacy)
}


def _read_own(kind: str, folder: Path, content: bytes) -> None:
    replace_file(folder / WEIGHTS_FILE, content)
    table, said = _parsed(content)
    try:
        entry = json.loads(said["entry"])
    except (KeyError, TypeError, ValueError, RecursionError):
        entry = None
    found, tensors = result(folder, _read_weight, folder, kind, entry), _tensors(folder)
    if tensors is None:
        assert found is None, "opens a file that is none"
        return
    parts = {name.removeprefix(f"{LAYER}."): each for name, each in table.items()}
    expected = decode(kind, parts, entry)
    assert (found is None) == (expected is None), "opens an invalid weight, or refuses a valid one"
    if expected is not None and _is_layout(entry):
        _assert_same(found.T if entry[3:] == [True] else found, expected)
    if _is_layout(entry) and max(entry[:3]) <= FEW:
        _load_layer(kind, WeightLayout(*entry), tensors, expected)


def _read_weight(folder: Path, kind: str, entry: object) -> Tensor:
    storage = {"format": kind, "linears": {LAYER: entry}}
    packed = compressed_weights(folder, storage)
    name = f"{LAYER}.weight"
    return with_compressed(folder, {}, packed).read([name])[name]


def _read_legacy(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_legacy(folder)
    return checkpoint.read(checkpoint.compressed)


def _tensors(folder: Path) -> dict[str, Tensor] | None:
    """Return the stored tensors, or None if the file is no valid safetensors file."""

    def read() -> dict[str, Tensor]:
        entries = read_header(folder / WEIGHTS_FILE)
        return Checkpoint(folder, {}, entries, entries).read(list(entries))

    return result(folder, read)


def _load_layer(
    kind: str, layout: WeightLayout, tensors: dict[str, Tensor], expected: Dense | None
) -> None:
    """Load tensors into a sparse layer, which must answer as the decoded weight or refuse."""
    given = {
        name: tensors[f"{LAYER}.{name}"]
        for name in format_named(kind).parts
        if f"{LAYER}.{name}" in tensors
    }
    if not given:
        return
    dtype = expected.dtype if expected else torch.float32
    layer = SparseLinear(format_named(kind), layout, bias=False, dtype=dtype)
    try:
        layer.load_state_dict(given)
    except CheckpointError:
        assert expected is None, "a layer refuses valid parts"
        return
    assert expected is not None, "a layer takes invalid parts"
    dense = layer.dense()
    _assert_same(dense, expected)
    x = torch.ones(2, layout.inputs, dtype=dtype)
    y, plain = layer(x), x @ dense.T
    assert torch.equal(y.nan_to_num(), plain.nan_to_num())


def _assert_same(found: Tensor, expected: Dense) -> None:
    assert (found.dtype, tuple(found.shape)) == (expected.dtype, expected.shape)
    data = found.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    assert data == expected.data, "opens to another weight"


def _parsed(content: bytes) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Return tensors and metadata of a file; nothing of what is no such file."""
    try:
        length = int.from_bytes(content[:8], "little")
        table, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        said = table.pop("__metadata__", {})
        tensors = {
            name: Stored(each["dtype"], tuple(each["shape"]), data[slice(*each["data_offsets"])])
            for name, each in table.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}, {}
    return tensors, said if isinstance(said, dict) else {}


def _is_layout(entry: object) -> TypeGuard[list[Any]]:
    if not isinstance(entry, list) or len(entry) not in {3, 4}:
        return False
    sizes, flags = entry[:3], entry[3:]
    if any(type(size) is not int or size < 0 for size in sizes):
        return False
    outputs, inputs, count = sizes
    fits = count <= outputs * inputs <= LARGEST and max(sizes) <= LARGEST
    return fits and all(type(flag) is bool for flag in flags)


def decode(kind: str, parts: dict[str, Stored], entry: object) -> Dense | None:
    """Return the dense weight of stored parts, or None if they are invalid.

    Args:
        kind: Name of the format.
        parts: Stored tensors, by the names of the format.
        entry: Layout as in ``config.json``.
    """
    if not _is_layout(entry) or not _fits(kind, parts, entry):
        return None
    outputs, inputs, count = entry[:3]
    # Without columns, a file of no bytes can have any number of rows of 2:4.
    rows = range(outputs if inputs or kind == "bitmask" else 0)
    kept = [_kept_columns(parts["keep"], row) for row in rows]
    if any(column >= inputs for columns in kept for column in columns):
        return None
    if kind == "2:4":
        pairs = [column // 4 for column in range(0, inputs, 4) for _ in range(2)]
        valid = all([column // 4 for column in columns] == pairs for columns in kept)
    else:
        ends = [0, *accumulate(len(columns) for columns in kept)]
        valid = [*_integers(parts["row_offsets"]), count] == ends
    if not valid:
        return None
    values = parts["weight"]
    size = FLOATS[values.dtype].itemsize
    out, taken = bytearray(outputs * inputs * size), 0
    for row, columns in enumerate(kept):
        for column in columns:
            place = (row * inputs + column) * size
            out[place : place + size] = values.data[taken : taken + size]
            taken += size
    return Dense(FLOATS[values.dtype], (outputs, inputs), bytes(out))


def _fits(kind: str, parts: dict[str, Stored], entry: list) -> bool:
    """Return whether all parts are there, with the types and shapes of a layout."""
    outputs, inputs, count = entry[:3]
    if kind == "2:4":
        shape, others = (outputs, inputs // 2), {}
    else:
        shape, others = (count,), {"row_offsets": ("I64", (outputs,))}
    expected = {"keep": ("U8", (outputs, -(-inputs // 8))), **others}
    found = {name: (part.dtype, part.shape) for name, part in parts.items()}
    dtype, size = found.get("weight", ("", ()))
    if dtype not in FLOATS or size != shape or prod(shape) != count:
        return False
    whole = kind != "2:4" or inputs % 4 == 0
    return whole and all(found.get(name) == each for name, each in expected.items())


def _kept_columns(keep: Stored, row: int) -> list[int]:
    width = keep.shape[1]
    bits = int.from_bytes(keep.data[row * width : (row + 1) * width], "little")
    return [column for column in range(8 * width) if bits >> column & 1]


def _decode_legacy(kind: str, table: dict[str, Stored]) -> dict[str, Dense] | None:
    decoded = {}
    for name, stored in table.items():
        layer = name.removesuffix(".compressed")
        if layer == name:
            continue
        shape = table.get(f"{layer}.shape")
        if shape is None or shape.dtype[0] not in "IU" or f"{layer}.weight" in table:
            return None
        parts = {
            part: table[f"{layer}.{theirs}"]
            for part, theirs in LEGACY_PARTS.items()
            if f"{layer}.{theirs}" in table
        }
        sizes = _integers(shape)
        count = prod(stored.shape)
        weight = decode(kind, parts, [*sizes, count]) if len(sizes) == 2 else None
        if weight is None:
            return None
        decoded[f"{layer}.weight"] = weight
    return decoded or None


def _integers(stored: Stored) -> list[int]:
    size, signed = int(stored.dtype[1:]) // 8, stored.dtype[0] == "I"
    places = range(0, len(stored.data), size)
    return [int.from_bytes(stored.data[at : at + size], "little", signed=signed) for at in places]


def random_file(reader: str, chance: random.Random) -> bytes:
    """Return a valid file for a reader: a random weight of random shape."""
    kinds = {"two_four": ["2:4"], "bitmask": ["bitmask"], "legacy": ["2:4", "bitmask"]}
    kind = chance.choice(kinds[reader])
    outputs, inputs = chance.randint(1, 6), chance.randint(1, 36)
    inputs = 4 * -(-inputs // 4) if kind == "2:4" else inputs
    made = torch.Generator().manual_seed(chance.getrandbits(32))
    weight = torch.randn(outputs, inputs, generator=made)
    if kind == "2:4":
        weight = weight.view(-1, 4).where(weight.view(-1, 4).argsort(1) < 2, 0).view(weight.shape)
    else:
        weight *= torch.rand(weight.shape, generator=made) < chance.choice((0.0, 0.3, 0.5, 0.9))
    parts = format_named(kind).compress(weight.to(chance.choice([*FLOATS.values()])))
    if reader == "legacy":
        tensors = {f"{LAYER}.{LEGACY_PARTS[part]}": value for part, value in parts.items()}
        shape = torch.tensor(weight.shape).view(-1, *chance.choice(([], [1])))
        theirs = next(name for name, ours in LEGACY.items() if ours == kind)
        return save(tensors | {f"{LAYER}.shape": shape}, {"format": theirs})
    layout = WeightLayout(outputs, inputs, parts["weight"].numel(), chance.random() < 0.3)
    tensors = {f"{LAYER}.{part}": value for part, value in parts.items()}
    return save(tensors, {"entry": json.dumps(layout.dump())})


WORDS = (0, 1, -1, 5, 2**31, 2**40, 2**63 - 1, -(2**63))


def changed(content: bytes, chance: random.Random) -> bytes:
    """Mutate the data of some tensors of a file."""
    data, spans = bytearray(content), _spans(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3)) if spans else 0):
        _change(data, *chance.choice(spans), chance)
    return bytes(data)


def _spans(content: bytes) -> list[tuple[int, int]]:
    """Return the first and last places of the tensors of a file; none if it is invalid."""
    length = 8 + int.from_bytes(content[:8], "little")
    try:
        offsets = [
            each["data_offsets"]
            for name, each in json.loads(content[8:length]).items()
            if name != "__metadata__"
        ]
        return [
            (length + start, length + end)
            for start, end in offsets
            if type(start) is type(end) is int and 0 <= start < end <= len(content) - length
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _change(data: bytearray, start: int, end: int, chance: random.Random) -> None:
    """Change some of the bytes from ``start`` to ``end``, in place."""
    at, other = chance.randrange(start, end), chance.randrange(start, end)
    match chance.randrange(7):
        case 0:
            data[at] ^= 1 << chance.randrange(8)
        case 1:
            data[at] = chance.choice((0, 255, 0x55, 0x33, 0x0F, 0x17, chance.randrange(256)))
        case 2:
            data[at], data[other] = data[other], data[at]
        case 3:  # inverted pairs, or two groups in another order
            data[at] = chance.choice((255 ^ data[at], data[at] >> 4 | data[at] << 4 & 0xF0))
        case 4:
            at -= (at - start) % 8
            word = (chance.choice(WORDS) % 2**64).to_bytes(8, "little")
            data[at : min(at + 8, end)] = word[: end - at]
        case 5:
            size = chance.choice((1, 2, 8, end - start))
            piece = data[at : min(at + size, end)]
            data[start : start + len(piece)] = piece
        case _:
            data[start:end] = bytes([chance.choice((0, 255, data[at]))]) * (end - start)
