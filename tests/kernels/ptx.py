"""An emulator of the assembly in our kernels, for the interpreter, which has none.

Only the instructions that the kernels use. An instance of an assembly block runs for each ``pack``
neighbouring entries; 32 instances in order are the lanes of a warp.
"""

import re
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton._C.libtriton import interpreter as memory
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

POISON = 0x7EADBEEF
INTEGERS = {"u32": np.uint32, "s32": np.int32, "b32": np.uint32}
METADATA = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)
"""Valid metadata of ``ordered_metadata``: an index, then a higher one."""


def install(monkeypatch):
    """Let the interpreter of this test run assembly."""
    shared = {}

    def run(self, asm, constraints, values, types, *pure_and_pack):
        warp = _Warps(constraints, values, types, pure_and_pack[1], shared)
        for statement in re.split(r"[;\n]", asm.replace("{ ", "").replace(" }", "")):
            if statement.strip() not in ("", "{", "}"):
                warp.step(statement.strip())
        return SimpleNamespace(get_result=warp.result)

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", run)


class _Warps:
    """The registers of all instances of a block of assembly."""

    def __init__(self, constraints, values, types, pack, shared):
        self.types, self.pack, self.shared = types, pack, shared
        self.registers = {}
        self.shape = tuple(types[0].shape)
        self.size = int(np.prod(self.shape)) // pack
        outputs = sum(part.startswith("=") for part in constraints.split(","))
        assert outputs == pack * len(types)
        assert len(constraints.split(",")) == outputs + pack * len(values)
        for number, handle in enumerate(values):
            flat = np.broadcast_to(handle.data, self.shape).reshape(self.size, pack)
            for entry in range(pack):
                self.registers[f"${outputs + pack * number + entry}"] = flat[:, entry].copy()

    def result(self, number):
        kind = self.types[number].scalar
        given = {tl.int32: np.int32, tl.float32: np.float32}[kind]
        columns = [self.registers[f"${self.pack * number + e}"] for e in range(self.pack)]
        columns = [column.astype(given, copy=False) for column in columns]
        return TensorHandle(np.stack(columns, 1).reshape(self.shape), kind)

    def step(self, statement):
        name, _, rest = statement.partition(" ")
        if name == ".reg":
            return
        if name == ".shared":
            variable, size = re.search(r"(\w+)\[(\d+)\]", rest).groups()
            self.shared[variable] = np.full(int(size), POISON, np.uint32)
            return
        operation, *suffixes = name.split(".")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        getattr(self, "_" + operation)(suffixes, operands)

    def value(self, operand, kind="b32"):
        if operand in self.registers:
            return self.registers[operand]
        if operand in self.shared:
            return np.zeros(self.size, np.uint32)  # where the only variable begins
        return np.full(self.size, int(operand, 0), INTEGERS[kind])

    def _mov(self, suffixes, operands):
        self.registers[operands[0]] = self.value(operands[1]).view(np.uint32)

    def _add(self, suffixes, operands):
        left, right = (self.value(each).view(np.uint32) for each in operands[1:])
        self.registers[operands[0]] = left + right

    def _shl(self, suffixes, operands):
        left = self.value(operands[1]).view(np.uint32)
        self.registers[operands[0]] = left << self.value(operands[2])

    def _words(self, operand):
        (words,) = self.shared.values()
        address = self.value(operand[1:-1]).astype(np.int64)
        assert not (address % 4).any()
        assert address.max(initial=0) < 4 * len(words)
        return words, address // 4

    def _st(self, suffixes, operands):
        assert suffixes == ["shared", "b32"]
        words, index = self._words(operands[0])
        words[index] = self.value(operands[1])

    def _red(self, suffixes, operands):
        assert suffixes == ["shared", "add", "u32"]
        words, index = self._words(operands[0])
        np.add.at(words, index, self.value(operands[1]))

    def _ld(self, suffixes, operands):
        if suffixes[0] == "shared":
            words, index = self._words(operands[1])
            self.registers[operands[0]] = words[index]
            return
        assert suffixes == ["global", "nc", "b32"]
        base, _, offset = operands[1][1:-1].partition("+")
        address = self.value(base).astype(np.uint64) + np.uint64(int(offset or 0))
        assert not (address % 4).any()
        zeros = np.zeros(self.size, np.int32)
        self.registers[operands[0]] = memory.load(
            address, np.ones(self.size, bool), zeros, np.dtype(np.int32)
        )

    def _mma(self, suffixes, operands):
        sums, weight, tokens, start, meta, selector = operands
        kind = suffixes[suffixes.index("f32") + 1]
        a, b, c = (self._four(each) for each in (weight, tokens, start))
        words = self.value(meta).view(np.uint32).reshape(-1, 32)
        found = np.stack(
            [_product(*each, int(selector, 0), kind) for each in zip(a, b, c, words, strict=True)]
        )
        for name, column in zip(_names(sums), np.moveaxis(found, 2, 0), strict=True):
            self.registers[name] = column.reshape(-1)

    def _four(self, operand):
        """Return the registers of a fragment, [warps, 32, 4]."""
        return np.stack([self.value(name) for name in _names(operand)], 1).reshape(-1, 32, 4)


def _names(operand):
    return [name.strip() for name in operand.strip("{}").split(",")]


def _halves(words, kind):
    """Return the two 16-bit floats of each register, the lower first."""
    pairs = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)
    if kind == "f16":
        return pairs.view(np.float16).astype(np.float32)
    return (pairs.astype(np.uint32) << 16).view(np.float32)


def _product(weight, tokens, total, meta, selector, kind):
    """Emulate mma.sp::ordered_metadata.m16n8k32 of one warp, with every lane at once.

    PTX ISA, "Matrix fragments for sparse mma.m16n8k32": of A, register r of lane (g, t) holds row
    g + 8 (r mod 2), kept columns 2t + 8 (r div 2) and the next; of B, row 2t + 8r and the next,
    column g; of C and D, row g + 8 (r div 2), column 2t + r mod 2. Metadata of rows g and g + 8,
    for half h of the columns, is in lane 4g + 2 selector + h.
    """
    g, t, r = np.ogrid[:8, :4, :4]
    a, b = (_halves(each, kind).reshape(8, 4, 4, 2) for each in (weight, tokens))
    kept, right = np.zeros((16, 16), np.float32), np.zeros((32, 8), np.float32)
    for pair in range(2):
        kept[g + 8 * (r % 2), 2 * t + 8 * (r // 2) + pair] = a[..., pair]
        right[2 * t + 8 * r + pair, g] = b[..., pair]
    row, group = np.ogrid[:16, :8]
    nibble = meta[4 * (row % 8) + 2 * selector + group // 4] >> (
        16 * (row // 8) + 4 * (group % 4)
    ).astype(np.uint32)
    assert np.isin(nibble & 15, METADATA).all()
    left = np.zeros((16, 32), np.float32)
    left[row, 4 * group + (nibble & 3)] = kept[:, ::2]
    left[row, 4 * group + (nibble >> 2 & 3)] = kept[:, 1::2]
    out = np.zeros((16, 8), np.float32)
    place = g + 8 * (r // 2), 2 * t + r % 2
    out[place] = total.reshape(8, 4, 4)
    return (out + left @ right)[place].reshape(32, 4)
