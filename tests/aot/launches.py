"""Every launch that is compiled ahead of time.

The real launchers run on meta tensors of real sizes. A kernel that spills registers says beside its
code why it may.
"""

from collections.abc import Callable, Iterator

import torch
import triton
from prunekit_kernels import (
    Groups,
    NOfM,
    Sweep,
    _select,
    _source,
    apply,
    attention_entropy,
    column_energy,
    gram,
    obs_block,
    probability_entropy,
    salience,
)

from tests.aot.compile_only import TARGETS
from tests.aot.compressed import compressed
from tests.aot.launch import BF16, F16, F32, NAMES, ONE, Launch, meta


def launches() -> list[Launch]:
    """Return every configuration of every kernel."""
    return [*_sums(), *_entropies(), *_selections(), *_masks(), *_sweeps(), *compressed()]


def everywhere() -> list[tuple[str, Launch]]:
    """Return each launch with each target that it runs on."""
    return [(target, launch) for launch in launches() for target in launch.targets]


def _sums() -> Iterator[Launch]:
    # The assembler that comes with Triton 3.7 spills a few registers of gram's wide tiles, where
    # that of 3.6 and 3.9 spills none.
    old = triton.__version__.startswith(("3.7", "3.8"))
    spills = dict.fromkeys(TARGETS, 256) if old else {}
    # SmolLM2-135M (576), Llama-3.1-8B's down_proj (14336), and an odd number; float16 compiles as
    # bfloat16 does, so once is enough.
    for dtype, inputs in [
        (F32, 576), (F32, 14336), (BF16, 576), (BF16, 14336), (BF16, 1001), (F16, 14336),
    ]:  # fmt: skip
        x, name = meta(2048, inputs, dtype=dtype), _named(dtype, inputs)
        out, targets = meta(inputs, inputs), ONE if dtype == F16 or inputs == 1001 else (*TARGETS,)
        run = _call(column_energy, x, meta(inputs), None)
        yield Launch("column_energy", name, run, targets=targets)
        yield Launch("gram", name, _call(gram, x, None, out, None), spills, targets)
    for dtype in (F32, BF16):
        x, what = meta(2048, 14336, dtype=dtype), _named(dtype, 14336, "cross")
        yield Launch("gram", what, _call(gram, x, x, meta(14336, 14336), None), spills)
    x, out = meta(2048, 4096, dtype=BF16), meta(4096, 4096)
    chosen = {"list": meta(300, dtype=torch.int64), "mask": meta(2048, dtype=torch.bool)}
    for kind, rows in chosen.items():
        name = _named(BF16, 4096, kind)
        yield Launch("column_energy", name, _call(column_energy, x, meta(4096), rows))
        yield Launch("gram", name, _call(gram, x, None, out, rows), spills)
    for dtype in (F32, BF16):
        x, state = meta(2048, 14336, dtype=dtype), meta(10, 14336, dtype=torch.float64)
        valid = meta(2048, dtype=torch.bool)
        yield Launch("salience", _named(dtype, 14336), _call(salience, x, x, state, None))
        yield Launch("salience", _named(dtype, 14336, "h"), _call(salience, x, None, state, None))
        for kind, left in {"sums": (False, False), "sums, products": (False, True)}.items():
            run = _call(salience, x, x, state, None, moments=left[0], products=left[1])
            yield Launch("salience", _named(dtype, 14336, kind), run)
        name = _named(dtype, 14336, "padded")
        yield Launch("salience", name, _call(salience, x, x, state, valid))


def _entropies() -> Iterator[Launch]:
    tensor_memory = {"sm_100": 64}
    for dtype, size in [
        (BF16, 64), (BF16, 80), (BF16, 128), (BF16, 256), (F32, 64), (F32, 128), (F32, 256),
    ]:  # fmt: skip
        q, k = meta(2, 32, 2048, size, dtype=dtype), meta(2, 8, 2048, size, dtype=dtype)
        what = f"{NAMES[dtype]} D={size} causal"
        options = (None, None, None, 0.1, True, 0, 0.0)
        run = _call(attention_entropy, q, k, *options)
        yield Launch("attention_entropy", what, run, tensor_memory)
    valid, none = meta(2, 2048, dtype=torch.bool), (None, None)
    for dtype, size in [(BF16, 128), (F32, 64)]:
        q, k = meta(2, 32, 2048, size, dtype=dtype), meta(2, 8, 2048, size, dtype=dtype)
        for name, options in {
            "plain": (*none, None, 0.1, False, 0, 0.0),
            "padded": (*none, valid, 0.1, True, 0, 0.0),
            "window capped": (*none, None, 0.1, True, 1024, 50.0),
            "masked": (meta(2, 1, 1, 2048, dtype=torch.bool), None, None, 0.1, False, 0, 0.0),
            "masked padded": (
                meta(2, 1, 1, 2048, dtype=torch.bool),
                None,
                valid,
                0.1,
                True,
                0,
                0.0,
            ),
            "biased": (None, meta(1, 32, 2048, 2048, dtype=dtype), None, 1.0, False, 0, 0.0),
        }.items():
            what = f"{NAMES[dtype]} D={size} {name}"
            run = _call(attention_entropy, q, k, *options)
            yield Launch("attention_entropy", what, run, tensor_memory)
        # A size of 1 is compiled into the kernel: decoding a token, and the first of all.
        for rows, keys in ((1, 2048), (1, 1)):
            few, options = (q[:, :, :rows], k[:, :, :keys]), (*none, None, 0.1, True, 0, 0.0)
            what = f"{NAMES[dtype]} D={size} S={rows} T={keys}"
            run = _call(attention_entropy, *few, *options)
            yield Launch("attention_entropy", what, run, targets=ONE)
    for dtype in (F32, BF16):
        p, mask = meta(2, 32, 1024, 1024, dtype=dtype), meta(2, 1, 1, 1024, dtype=torch.bool)
        valid, what = meta(2, 1024, dtype=torch.bool), f"{NAMES[dtype]} T=1024"
        for name, given in {
            "": (p, None, None),
            " masked": (p, mask, None),
            " padded": (p, None, valid),
            " masked padded": (p, mask, valid),
            " S=1": (p[:, :, :1], None, None),
            " S=1 cut to 1": (p[:, :, :1, :1], None, None),
        }.items():
            yield Launch("probability_entropy", what + name, _call(probability_entropy, *given))


WINDOWS = Groups(None, 128, (4096 * 64,) * 32)
SELECTIONS = {
    "row": Groups(1, None, (2048,)),
    "1:2": Groups(1, 2, (1,)),
    "2:4": Groups(1, 4, (2,)),
    "4:8": Groups(1, 8, (4,)),
    "5:10": Groups(1, 10, (5,)),
    "16:32": Groups(1, 32, (16,)),
    "layer": Groups(None, None, (4096 * 2048,)),
    "windows": WINDOWS,
    "block 4x4": Groups(None, None, (4096 * 128,), (4, 4)),
    "block 32x160": Groups(None, None, (1600,), (32, 160)),
    "rows": Groups(None, None, (2048,), (1, 4000)),
    "columns": Groups(None, None, (2000,), (4096, 1)),
}

EVERYWHERE = ("row", "1:2", "2:4", "4:8", "layer")  # the others share their kernels
RAGGED = ("5:10", "block 32x160", "rows", "columns")  # that do not divide 4096, or need not


def _selections() -> Iterator[Launch]:
    long = {"sm_90": 64}
    for name, groups in SELECTIONS.items():
        inputs = 4000 if name in RAGGED else 4096
        what, few = f"I={inputs} {name}", (*TARGETS,) if name in ("row", "2:4") else ONE
        most = (*TARGETS,) if name in EVERYWHERE else ONE
        run = _chosen(_weight(inputs, BF16), groups)
        yield Launch("score_and_mask", f"bf16 {what}", run, targets=most)
        run = _chosen(_iterate(inputs), groups)
        yield Launch("project", f"f32 {what}", run, targets=most)
        for factors in ("magnitude", "wanda"):
            run = _chosen(_weight(inputs, BF16, factors), groups)
            yield Launch("score_and_mask", f"bf16 {what} {factors}", run, targets=few)
    for name in ("row", "2:4", "layer", "block 4x4"):
        groups, what = SELECTIONS[name], f"f32 I=4096 {name}"
        most = (*TARGETS,) if name in EVERYWHERE else ONE
        run = _chosen(_weight(4096, F32), groups)
        yield Launch("score_and_mask", what, run, targets=most)
        yield Launch("selection", what, _chosen(_score(4096), groups), targets=most)
    for inputs in (576, 8192, 16384, 28672):
        groups, spills = Groups(1, None, (inputs // 2,)), long if inputs > 16384 else {}
        what, targets = f"bf16 I={inputs} row", ONE if inputs < 16384 else (*TARGETS,)
        run = _chosen(_weight(inputs, BF16), groups)
        yield Launch("score_and_mask", what, run, spills, targets)
        run = _chosen(_iterate(inputs), groups)
        yield Launch("project", f"f32 I={inputs} row", run, spills, targets)
    yield Launch(
        "score_and_mask", "bf16 I=40960 row",
        _chosen(_weight(40960, BF16), Groups(1, None, (999,))), targets=ONE,
    )  # fmt: skip


def _masks() -> Iterator[Launch]:
    for dtype in (F32, BF16):
        weight, bits = meta(4096, 4096, dtype=dtype), meta(4096, 512, dtype=torch.uint8)
        yield Launch("packed_mask", f"{NAMES[dtype]} apply", _call(apply, weight, bits))


def _sweeps() -> Iterator[Launch]:
    # Whether rows are a multiple of 16 makes no difference: alignment is not specialised on.
    for choice in (None, NOfM(1, 2), NOfM(2, 4), NOfM(4, 8), NOfM(8, 16), NOfM(2, 3)):
        n, m = choice or (0, 1)
        panel = 16 // m * m
        for size, targets in ((4096, (*TARGETS,)), (1001, ONE)):
            work, upper = meta(size, size), meta(size, size)
            sweep = Sweep(work, work, meta(size, size, dtype=torch.bool), upper)
            name = f"f32 O={size} {f'{n}:{m}' if choice else 'given'}"
            run = _call(obs_block, sweep, 0, 128 // panel * panel, n, m, panel)
            yield Launch("obs_block", name, run, targets=targets)
    yield Launch("obs_block", "f32 O=1001 given, 9 columns", _call(obs_block, sweep, 0, 9, 0, 1, 9))


def _weight(inputs: int, dtype: torch.dtype, factors: str = "ria") -> _source.Source:
    scale = None if factors == "magnitude" else meta(inputs)
    row, column = (meta(4096), meta(inputs)) if factors == "ria" else (None, None)
    return _source.weights(meta(4096, inputs, dtype=dtype), scale, row, column)


def _iterate(inputs: int) -> _source.Source:
    return _source.iterate(meta(4096, inputs), meta(4096, inputs), 1.5, meta(4096, inputs))


def _score(inputs: int) -> _source.Source:
    return _source.scores(meta(4096, inputs))


def _chosen(source: _source.Source, groups: Groups) -> Callable[[], object]:
    return lambda: _select.launch(source, groups)


def _call(function: Callable, *arguments, **options) -> Callable[[], object]:
    # An op hides the module of the same name: `prunekit_kernels.gram` is the function.
    launch = function.__globals__["_launch"]
    return lambda: launch(*arguments, **options)


def _named(dtype: torch.dtype, inputs: int, extra: str = "") -> str:
    return f"{NAMES[dtype]} I={inputs} {extra}".strip()
