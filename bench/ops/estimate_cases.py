"""The work that kernels are estimated on: real launches on meta tensors, with their goals."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from prunekit_kernels import Groups, _select, _source

from tests.aot.launch import BF16, meta

NVIDIA = ("sm_90", "sm_80")
ALL = (*NVIDIA, "gfx942")
ROW_STEPS = 8.5  # steps of the secant, measured on scores of 4096 and 11008 columns


@dataclass(frozen=True)
class Work:
    """One piece of work.

    Attributes:
        name: The op and its sizes.
        run: Launches it on meta tensors.
        bytes: Least memory traffic.
        goal: Share of the floor that the kernel is to reach, in words.
        flops: Operations of matrix products.
        streams: Bytes that each kernel loads in its streaming loop.
        moves: Bytes that each kernel reads and writes, where not ``bytes``.
        steps: Trips of the other loops of each kernel, or of a kernel on a target, by their place
            in its listing.
        targets: GPUs that it runs on.
    """

    name: str
    run: Callable[[], object]
    bytes: int
    goal: str
    flops: float = 0.0
    streams: Mapping[str, int] = field(default_factory=dict)
    moves: Mapping[str, int] = field(default_factory=dict)
    steps: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    targets: tuple[str, ...] = ALL


def works() -> Iterator[Work]:
    """Yield all work."""
    yield from _scores()
    yield from _decodes()
    yield from _streams()


def _scores() -> Iterator[Work]:
    size = 4096 * 4096
    weight = meta(4096, 4096, dtype=BF16)
    source = _source.weights(weight, meta(4096), None, None)
    least, once = 4 * size + size // 8, 2 * size
    row, layer, pairs = (
        Groups(1, None, (2048,)),
        Groups(None, None, (size // 2,)),
        Groups(1, 4, (2,)),
    )
    yield Work(
        "score_and_mask 4096² row", lambda: _select.launch(source, row), least, "40 %",
        steps={"row_kernel": {0: ROW_STEPS, 1: 0}},
    )  # fmt: skip
    # Which weights go is known only once all were read, so that each is read twice. Of the loops
    # that write, the first is for thresholds without ties to split.
    yield Work(
        "score_and_mask 4096² layer", lambda: _select.launch(source, layer), least + once, "60 %",
        streams={"count_kernel": 3 * once, "write_kernel": 3 * once},
        moves={"count_kernel": once, "write_kernel": least},
        steps={"write_kernel": {1: 0, 2: 0, 3: 0}},
    )  # fmt: skip
    yield Work("score_and_mask 4096² 2:4", lambda: _select.launch(source, pairs), least, "60 %")
    score = _source.scores(meta(4096, 128))
    block = Groups(None, None, (4096 * 64,))
    module = importlib.import_module("prunekit_kernels._select_radix")
    yield Work(
        "choose 4096 × 128, half", lambda: module.choose(score, block), 5 * 4096 * 128, "",
        streams={"count_kernel": 4 * 4096 * 128, "write_kernel": 4 * 4096 * 128},
        moves={"count_kernel": 4 * 4096 * 128}, steps={"write_kernel": {1: 0, 2: 0, 3: 0}},
    )  # fmt: skip
    mask = importlib.import_module("prunekit_kernels.packed_mask")
    bits = meta(4096, 512, dtype=torch.uint8)
    yield Work("packed apply 4096² bf16", lambda: mask._launch(weight, bits), least, "80 %")


def _decodes() -> Iterator[Work]:
    module = importlib.import_module("prunekit_kernels.sparse24_mma")
    for outputs, inputs, goal in (
        (4096, 4096, "1.4 × cuBLAS: below 6.7 µs"),
        (4096, 11008, "1.5 × cuBLAS"),
        (8192, 28672, "1.6 × cuBLAS: below 73 µs"),
    ):
        values = meta(outputs, inputs // 2, dtype=BF16)
        keep = meta(outputs, inputs // 8, dtype=torch.uint8)
        least = values.nbytes + keep.nbytes
        for tokens in (1, 16):
            x = meta(tokens, inputs, dtype=BF16)
            yield Work(
                f"2:4 decode {outputs} × {inputs} M={tokens}",
                lambda x=x, values=values, keep=keep: module._launch_few(x, values, keep),
                least, goal if tokens == 1 else "", streams={"few_kernel": least}, targets=NVIDIA,
            )  # fmt: skip


def _streams() -> Iterator[Work]:
    salience = importlib.import_module("prunekit_kernels.salience")
    energy = importlib.import_module("prunekit_kernels.column_energy")
    h, state = meta(16384, 11008, dtype=BF16), meta(10, 11008, dtype=torch.float64)
    both = 2 * h.nbytes
    for what, moments, products in (
        ("all", True, True), ("sums and products", False, True), ("sums", False, False),
    ):  # fmt: skip
        yield Work(
            f"salience 16384 × 11008, {what}",
            lambda m=moments, p=products: salience._launch(
                h, h, state, None, moments=m, products=p
            ),
            both, "80 %",
            moves={"merge_kernel": 17 * 9 * 8 * 11008},
            steps={
                "part_kernel": _strides(first=moments or products),
                # The loop of strides does not show in the listing: its own code counts once.
                "part_kernel gfx942": {0: 16, 1: 256} if moments or products else {0: 256},
                "merge_kernel": {0: 16},
            },
        )  # fmt: skip
    x = meta(16384, 4096, dtype=BF16)
    yield Work(
        "column_energy 16384 × 4096", lambda: energy._launch(x, meta(4096), None), x.nbytes, "80 %",
        streams={"kernel": x.nbytes}, moves={"add_kernel": 33 * 4 * 4096},
        steps={"add_kernel": {0: 32}},
    )  # fmt: skip


def _strides(*, first: bool) -> dict[int, float]:
    """Return the trips of the loops of a part of 1024 tokens, as they lie in the listing.

    The loop of strides; in it, with first values, their loop, which runs 16 times in all; and the
    loop within a stride.
    """
    return {0: 16, 1: 1, 2: 16} if first else {0: 16, 1: 16}
