"""Listings of compiled kernels: instructions, their loops, and loads on their way.

NVIDIA: the machine code, by ``nvdisasm`` of the Triton in use. AMD: its assembly.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

LABEL = re.compile(r"^\.?(L[\w.]+):")
NVIDIA = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
AMD = re.compile(r"^\s+([a-z]\w+)\s*([^;]*)")
AMD_NAMES = ("s_", "v_", "global_", "buffer_", "flat_", "ds_")
REGISTER = re.compile(r"\bR(\d+)(?:\.64)?\b")
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "ubyte": 1}
LANES = {"cubin": 32, "amdgcn": 64}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: With its suffixes.
        operands: As printed.
        target: Label that a branch goes to.
        always: Whether it is left for the next one never: an end, or a branch without condition.
    """

    name: str
    operands: str
    target: str | None = None
    always: bool = False

    @property
    def load_bytes(self) -> int:
        """Bytes that a thread loads from global memory."""
        if self.name.startswith(("LDG", "LDGSTS")) and not self.name.startswith("LDGDEPBAR"):
            found = [WIDTHS[part] for part in self.name.split(".") if part in WIDTHS]
            return found[0] if found else 4
        if self.name.startswith(("global_load", "buffer_load", "flat_load")):
            found = [size for part, size in AMD_WIDTHS.items() if part in self.name.split("_")]
            return found[0] if found else 4
        return 0


@dataclass(frozen=True)
class Loop:
    """Instructions from the first to the one that branches back."""

    first: int
    last: int


@dataclass(frozen=True)
class Listing:
    """The code of a kernel."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    lanes: int

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Loops in the order of their beginnings; the trap that ends a kernel is none.

        A branch back closes a loop if the code in between leads to it: not where it ends code that
        is out of line.
        """
        ends: dict[int, int] = {}
        for place, each in enumerate(self.instructions):
            start = self.labels.get(each.target or "", place)
            if start < place and self._leads(start, place):
                ends[start] = max(ends.get(start, 0), place)
        return tuple(Loop(*each) for each in sorted(ends.items()))

    def _leads(self, start: int, end: int) -> bool:
        """Return whether a way from an instruction to a later one stays between them."""
        seen: set[int] = set()
        left = [start]
        while left:
            here = left.pop()
            while start <= here <= end and here not in seen:
                seen.add(here)
                each = self.instructions[here]
                if each.target in self.labels:
                    left.append(self.labels[each.target])
                if each.always:
                    break
                here += 1
        return end in seen

    def within(self, loop: Loop) -> tuple[Instruction, ...]:
        """Return the instructions of a loop, inner loops included."""
        return self.instructions[loop.first : loop.last + 1]

    def is_inner(self, loop: Loop) -> bool:
        """Return whether no other loop lies within."""
        return not any(
            loop.first <= each.first and each.last <= loop.last and each != loop
            for each in self.loops
        )

    def load_bytes(self, loop: Loop) -> int:
        """Return the bytes that a warp loads in one trip, inner loops once."""
        return self.lanes * sum(each.load_bytes for each in self.within(loop))

    def in_flight(self, loop: Loop) -> int:
        """Return the bytes that a warp has on their way before it needs the first.

        AMD: those issued before an instruction that waits for them. NVIDIA, copies to shared
        memory: those of the groups that may be outstanding when the loop waits; loads to registers:
        those issued before the first instruction that reads one of them.
        """
        code = self.within(loop)
        if self.lanes == LANES["amdgcn"]:
            return self.lanes * _unawaited(code)
        copies = sum(each.load_bytes for each in code if each.name.startswith("LDGSTS"))
        if copies:
            return self.lanes * self._copied_ahead(code, copies)
        written: set[int] = set()
        issued = most = 0
        for each in code + code:
            registers = [int(number) for number in REGISTER.findall(each.operands)]
            loaded = each.load_bytes
            read = registers[1:] if loaded or registers else registers
            if any(number in written for number in read):
                written, issued = set(), 0
            if loaded and registers:
                words = max(loaded // 4, 1)
                written |= {*range(registers[0], registers[0] + words)}
                issued += loaded
                most = max(most, issued)
        return self.lanes * most

    def _copied_ahead(self, code: tuple[Instruction, ...], copies: int) -> int:
        """Return the bytes of copies that are outstanding while the loop waits."""
        waits = [each for each in code if each.name.startswith("DEPBAR")]
        allowed = [
            int(n, 16) for each in waits for n in re.findall(r"0x([0-9a-f]+)", each.operands)
        ]
        groups = max(1, sum(each.name.startswith("LDGDEPBAR") for each in code))
        return copies * max([*allowed, groups]) // groups


def _unawaited(code: tuple[Instruction, ...]) -> int:
    """Return the most bytes of a thread that no ``s_waitcnt`` has awaited, in two trips."""
    memory = ("global_", "buffer_", "flat_")
    queue: list[int] = []
    most = 0
    for each in code + code:
        if each.name.startswith(memory):
            queue.append(each.load_bytes)  # stores wait in the same queue
            most = max(most, sum(queue))
        elif found := re.search(r"vmcnt\((\d+)\)", each.operands):
            queue = queue[max(len(queue) - int(found[1]), 0) :]
    return most


def listing(kernel) -> Listing:
    """Return the listing of a compiled kernel."""
    if "cubin" in kernel.asm:
        return parsed(_disassembled(kernel.asm["cubin"]), "cubin")
    return parsed(kernel.asm["amdgcn"], "amdgcn")


def parsed(text: str, kind: str) -> Listing:
    """Return the listing of printed code.

    Args:
        text: As printed by ``nvdisasm -c``, or AMD's assembly.
        kind: "cubin" or "amdgcn".
    """
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(found)
        elif kind == "cubin" and (match := NVIDIA.search(line)):
            predicate, name, operands = match.groups()
            target = re.search(r"`\(\.?(L[\w.]+)\)", operands)
            goal = target[1] if target and name.startswith("BRA") else None
            ends = name.startswith("EXIT") or (goal and operands.startswith("`"))
            found.append(Instruction(name, operands.strip(), goal, bool(ends and not predicate)))
        elif kind == "amdgcn" and (match := AMD.match(line)) and match[1].startswith(AMD_NAMES):
            name, operands = match.groups()
            target = re.search(r"\.(L\w+)", operands) if "branch" in name else None
            goal, ends = target[1] if target else None, name in ("s_branch", "s_endpgm")
            found.append(Instruction(name, operands.strip(), goal, ends))
    while found and found[-1].name in ("NOP", "BRA"):
        found.pop()
    return Listing(tuple(found), labels, LANES[kind])


def _disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
