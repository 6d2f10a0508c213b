"""Whether sparse layers are faster here: measured, layer by layer and as whole models.

Every contestant does the same work, on as many copies of the weight as no cache holds, since a
model's other layers push a weight out between two tokens. On a GPU the calls are captured in a CUDA
graph: launches from Python would hide what few tokens cost.

Shapes: M tokens at once, O output features, I input features.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from prunekit.inference import speed_table
from prunekit.inference.sparse_linear import SparseLinear
from prunekit.models.devices import now

SECONDS = 0.3  # a contestant, at least
COLD_BYTES = {"cuda": 2**28, "cpu": 2**26}  # copies of a weight together: more than caches hold
EVERYTHING = 2**31  # a reach that no number of tokens exceeds
TOKENS = {"cuda": (1, 4, 16, 64, 256, 1024, 4096), "cpu": (1, 16, 128)}
SHAPES = {
    "cuda": (
        (4096, 4096),
        (11008, 4096),
        (4096, 11008),
        (8192, 8192),
        (28672, 8192),
        (8192, 28672),
    ),
    "cpu": ((576, 576), (1536, 576), (2048, 2048)),
}
"""Layers of Llama-2-7B and 70B on a GPU; of SmolLM2-135M and a larger one on a CPU."""

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One contestant on one layer with one number of tokens.

    Attributes:
        outputs: O.
        inputs: I.
        tokens: M.
        way: dense, or how a sparse weight was multiplied.
        seconds: Median.
        dense: Seconds of the dense layer over these: above 1, it is faster.
        bandwidth: Bytes that have to be read and written, over the time, over the copy bandwidth.
        peak: Operations of a dense product over the time, over the rate of a large one.
    """

    outputs: int
    inputs: int
    tokens: int
    way: str
    seconds: float
    dense: float
    bandwidth: float
    peak: float


@dataclass
class Measured:
    """What was measured on one device."""

    device: str
    dtype: str
    copy_bytes_per_second: float
    product_flops_per_second: float
    rows: list[Row] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)

    def dump(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self) | {"verdicts": verdicts(self)}


def measure(
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int]] | None = None,
    tokens: Sequence[int] | None = None,
) -> Iterator[Measured | Row]:
    """Yield rows as they are measured and, last, all of them; on a GPU fill the tuning table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found = Measured(
        name, str(dtype).removeprefix("torch."), copy_rate(device), product_rate(device, dtype)
    )
    for outputs, inputs in shapes or SHAPES[device.type]:
        ways = contestants(outputs, inputs, dtype, device)
        for count in tokens or TOKENS[device.type]:
            x = torch.randn(count, inputs, device=device).to(dtype)
            base = 0.0
            for way, (calls, size) in ways.items():
                seconds = median_seconds([lambda call=call, x=x: call(x) for call in calls], device)
                base = base or seconds
                moved = size + x.nbytes + count * outputs * dtype.itemsize
                row = Row(
                    outputs, inputs, count, way, seconds, base / seconds,
                    moved / seconds / found.copy_bytes_per_second,
                    2 * count * outputs * inputs / seconds / found.product_flops_per_second,
                )  # fmt: skip
                found.rows.append(row)
                yield row
    if device.type == "cuda":
        speed_table.save(name, choices(found))
    yield found


def contestants(
    outputs: int, inputs: int, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[list[Call], int]]:
    """Return calls on several copies of a weight, and its bytes, by what they are; dense first."""
    dense = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    mask = torch.rand(outputs, inputs // 4, 4).argsort(2).argsort(2) < 2
    dense.weight.data *= mask.view(outputs, inputs)
    copies = max(1, min(16, COLD_BYTES[device.type] // dense.weight.nbytes))
    weight = dense.weight.detach().to(device)
    weights = [weight.clone() for _ in range(copies)]
    ways: dict[str, tuple[list[Call], int]] = {
        "dense": ([lambda x, w=w: linear(x, w) for w in weights], weight.nbytes)
    }
    for kind in ("2:4", "bitmask"):
        sparse = SparseLinear.of(dense, kind).to(device)
        size = sum(part.nbytes for part in sparse.parts.values())
        for way, reach in ((kind, EVERYTHING), (f"{kind} expanded", 0)):
            if device.type == "cpu" and reach == 0:
                continue  # the same there: a CPU always expands
            layers = [_copy(sparse, reach) for _ in range(copies)]
            ways[way] = (layers, size)
    return ways | dict(_semi_structured(weights, int(weight.nbytes * 0.5625)))


def _copy(sparse: SparseLinear, reach: int) -> SparseLinear:
    import copy

    made = copy.deepcopy(sparse)
    made.reach = reach
    return made


def _semi_structured(
    weights: list[Tensor], size: int
) -> Iterator[tuple[str, tuple[list[Call], int]]]:
    """Yield torch's own 2:4 products, where this device and this shape have them."""
    if not weights[0].is_cuda:
        return
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    kinds = {
        "cuSPARSELt": SparseSemiStructuredTensorCUSPARSELT,
        "CUTLASS": SparseSemiStructuredTensorCUTLASS,
    }
    for name, kind in kinds.items():
        try:
            packed = [kind.from_dense(weight) for weight in weights]
            linear(weights[0].new_zeros(64, weights[0].shape[1]), packed[0])
        except (RuntimeError, NotImplementedError, ValueError):
            continue  # torch was built without it, or it has no such shape
        yield name, ([lambda x, w=w: linear(x, w) for w in packed], size)


def median_seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Return the median time of one call, each in its turn."""
    run = _captured(calls) if device.type == "cuda" else lambda: [call() for call in calls]
    run()
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 3:
        times.append(_seconds(run, device))
    return statistics.median(times) / len(calls)


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    began = now(device)
    run()
    return now(device) - began


def copy_rate(device: torch.device) -> float:
    """Return the bytes read and written in a second by copying what no cache holds."""
    source = torch.zeros(COLD_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds([lambda: target.copy_(source)], device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations in a second of a large square product."""
    size = 8192 if device.type == "cuda" else 2048
    square = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / median_seconds([lambda: square @ square], device)


def choices(found: Measured) -> dict[str, speed_table.Choice]:
    """Return how each layer had better multiply: what sparse layers look up."""
    chosen = {}
    for kind in ("2:4", "bitmask"):
        for outputs, inputs in {(row.outputs, row.inputs) for row in found.rows}:
            times: dict[int, dict[str, float]] = {}
            for row in found.rows:
                if (row.outputs, row.inputs) == (outputs, inputs):
                    times.setdefault(row.tokens, {})[row.way] = row.seconds
            layer = speed_table.key(kind, found.dtype, outputs, inputs)
            chosen[layer] = _choice(kind, times)
    return chosen


def _choice(kind: str, times: dict[int, dict[str, float]]) -> speed_table.Choice:
    semi = ("cuSPARSELt", "CUTLASS") if kind == "2:4" else ()
    reach, with_semi, pays = 0, False, 0
    for tokens, ways in sorted(times.items()):
        fastest_semi = min((ways[way] for way in semi if way in ways), default=float("inf"))
        expanded = ways.get(f"{kind} expanded", float("inf"))
        if ways[kind] <= min(expanded, fastest_semi):
            reach = tokens
        else:
            with_semi = fastest_semi < expanded
        if min(ways[kind], expanded, fastest_semi) < ways["dense"]:
            pays = tokens
    return speed_table.Choice(reach, with_semi, pays)


def verdicts(found: Measured) -> list[str]:
    """Return one line for each format: for how many tokens it pays here, if for any."""
    lines = []
    for kind in ("2:4", "bitmask"):
        speeds = best_speeds(found.rows, kind)
        if not speeds:
            continue
        pays = [tokens for tokens, speed in speeds.items() if speed > 1]
        said = ", ".join(f"{speed:.2g}x at M = {tokens}" for tokens, speed in speeds.items())
        if not pays:
            answer = f"{kind} does not pay on {found.device}, it only saves memory"
        elif len(pays) == len(speeds):
            answer = f"{kind} pays on {found.device} for every M measured"
        else:
            answer = f"{kind} pays on {found.device} for M = {', '.join(map(str, pays))}"
        lines.append(f"{answer} (geometric mean over layers, dense is 1: {said}).")
    return lines


def best_speeds(rows: Iterable[Row], kind: str) -> dict[int, float]:
    """Return, for each M, the speed over dense of the fastest way; geometric mean over layers."""
    ways = {kind, f"{kind} expanded", *(("cuSPARSELt", "CUTLASS") if kind == "2:4" else ())}
    best: dict[int, dict[tuple[int, int], float]] = {}
    for row in rows:
        if row.way in ways:
            layers = best.setdefault(row.tokens, {})
            layer = (row.outputs, row.inputs)
            layers[layer] = max(layers.get(layer, 0.0), row.dense)
    return {m: statistics.geometric_mean(layers.values()) for m, layers in sorted(best.items())}
