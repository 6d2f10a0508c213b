"""Measure the speed of sparse linear layers against dense ones.

Every implementation computes the same product on several copies of the weight, which together
exceed the caches: in a model, the other layers evict a weight between two tokens. On a GPU the
calls are captured in a CUDA graph, since Python launch overhead would dominate for few tokens.

Shapes: M tokens at once, O output features, I input features.
"""

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from prunekit.inference import speed_table
from prunekit.inference.sparse_linear import SparseLinear
from prunekit.models.devices import synchronized_seconds

MIN_SECONDS = 0.3  # minimum measurement time of an implementation
COLD_BYTES = {"cuda": 2**28, "cpu": 2**26}  # all copies of a weight together: more than caches hold
UNLIMITED_TOKENS = 2**31  # max_kernel_tokens that no number of tokens exceeds
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
"""[O, I] of layers of Llama-2-7B and 70B (GPU), and of SmolLM2-135M and a larger model (CPU)."""

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SpeedRow:
    """Speed of one implementation on one layer shape with M tokens.

    Attributes:
        outputs: O.
        inputs: I.
        tokens: M.
        way: Name of the implementation; "dense" for the dense layer.
        seconds: Median seconds of one product.
        dense: Speedup over the dense layer: its seconds divided by these.
        bandwidth: Minimum bytes read and written per second, as a fraction of the copy bandwidth.
        peak: Operations of the dense product per second, as a fraction of a large product's rate.
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
class SpeedResults:
    """Measurements on one device.

    Attributes:
        device: Name of the device.
        dtype: Dtype of weights and activations.
        copy_bytes_per_second: Bytes read plus written per second by a large copy.
        product_flops_per_second: Operations per second of a large dense product.
        rows: One entry per layer shape, number of tokens and implementation.
        models: Whole-model measurements; see :mod:`prunekit.inference.model_speed`.
    """

    device: str
    dtype: str
    copy_bytes_per_second: float
    product_flops_per_second: float
    rows: list[SpeedRow] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the measurements and verdicts as JSON values."""
        return asdict(self) | {"verdicts": verdicts(self)}


def measure_layers(
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int]] | None = None,
    tokens: Sequence[int] | None = None,
) -> Iterator[SpeedResults | SpeedRow]:
    """Yield each measurement and finally all results.

    On a GPU the results are also saved in the speed table, which sparse layers read.

    Args:
        device: Device to measure.
        dtype: Dtype of weights and activations.
        shapes: [O, I] of the layers; None for SHAPES.
        tokens: Values of M; None for TOKENS.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    results = SpeedResults(
        name, str(dtype).removeprefix("torch."), copy_rate(device), product_rate(device, dtype)
    )
    for outputs, inputs in shapes or SHAPES[device.type]:
        ways = implementations(outputs, inputs, dtype, device)
        for count in tokens or TOKENS[device.type]:
            x = torch.randn(count, inputs, device=device).to(dtype)
            base = 0.0
            for way, (calls, size) in ways.items():
                seconds = median_seconds([lambda call=call, x=x: call(x) for call in calls], device)
                base = base or seconds
                moved = size + x.nbytes + count * outputs * dtype.itemsize
                row = SpeedRow(
                    outputs, inputs, count, way, seconds, base / seconds,
                    moved / seconds / results.copy_bytes_per_second,
                    2 * count * outputs * inputs / seconds / results.product_flops_per_second,
                )  # fmt: skip
                results.rows.append(row)
                yield row
    if device.type == "cuda":
        speed_table.save(name, kernel_choices(results))
    yield results


def implementations(
    outputs: int, inputs: int, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[list[Call], int]]:
    """Return the implementations of one layer, dense first.

    Args:
        outputs: O.
        inputs: I; a multiple of 4.
        dtype: Dtype of the weight.
        device: Device of the weight.

    Returns:
        Name → calls on several copies of the weight, and the bytes of one copy.
    """
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
        for way, max_tokens in ((kind, UNLIMITED_TOKENS), (f"{kind} expanded", 0)):
            if device.type == "cpu" and max_tokens == 0:
                continue  # identical: a CPU always expands the weight
            layers = [_copy(sparse, max_tokens) for _ in range(copies)]
            ways[way] = (layers, size)
    return ways | dict(_semi_structured(weights, int(weight.nbytes * 0.5625)))


def _copy(sparse: SparseLinear, max_tokens: int) -> SparseLinear:
    made = copy.deepcopy(sparse)
    made.max_kernel_tokens = max_tokens
    return made


def _semi_structured(
    weights: list[Tensor], size: int
) -> Iterator[tuple[str, tuple[list[Call], int]]]:
    """Yield torch's own 2:4 products that support this device and shape."""
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
            continue  # not in this build of torch, or not for this shape
        yield name, ([lambda x, w=w: linear(x, w) for w in packed], size)


def median_seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Return the median seconds per call over rounds of all calls."""
    run = _captured(calls) if device.type == "cuda" else lambda: [call() for call in calls]
    run()
    times: list[float] = []
    while sum(times) < MIN_SECONDS or len(times) < 3:
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
    began = synchronized_seconds(device)
    run()
    return synchronized_seconds(device) - began


def copy_rate(device: torch.device) -> float:
    """Return the bytes read plus written per second by a large copy."""
    source = torch.zeros(COLD_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds([lambda: target.copy_(source)], device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large square product."""
    size = 8192 if device.type == "cuda" else 2048
    square = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / median_seconds([lambda: square @ square], device)


def kernel_choices(results: SpeedResults) -> dict[str, speed_table.KernelChoice]:
    """Return the fastest kernels by key of the speed table."""
    choices = {}
    for kind in ("2:4", "bitmask"):
        for outputs, inputs in {(row.outputs, row.inputs) for row in results.rows}:
            times: dict[int, dict[str, float]] = {}
            for row in results.rows:
                if (row.outputs, row.inputs) == (outputs, inputs):
                    times.setdefault(row.tokens, {})[row.way] = row.seconds
            layer = speed_table.layer_key(kind, results.dtype, outputs, inputs)
            choices[layer] = _choice(kind, times)
    return choices


def _choice(kind: str, times: dict[int, dict[str, float]]) -> speed_table.KernelChoice:
    semi = ("cuSPARSELt", "CUTLASS") if kind == "2:4" else ()
    max_tokens, semi_structured, faster = 0, False, 0
    for tokens, ways in sorted(times.items()):
        fastest_semi = min((ways[way] for way in semi if way in ways), default=float("inf"))
        expanded = ways.get(f"{kind} expanded", float("inf"))
        if ways[kind] <= min(expanded, fastest_semi):
            max_tokens = tokens
        else:
            semi_structured = fastest_semi < expanded
        if min(ways[kind], expanded, fastest_semi) < ways["dense"]:
            faster = tokens
    return speed_table.KernelChoice(max_tokens, semi_structured, faster)


def verdicts(results: SpeedResults) -> list[str]:
    """Return one sentence per format: where it beats dense."""
    lines = []
    for kind in ("2:4", "bitmask"):
        speeds = best_speedups(results.rows, kind)
        if not speeds:
            continue
        faster = [tokens for tokens, speed in speeds.items() if speed > 1]
        speedups = ", ".join(f"{speed:.2g}x at M = {tokens}" for tokens, speed in speeds.items())
        if not faster:
            verdict = f"{kind} does not pay on {results.device}, it only saves memory"
        elif len(faster) == len(speeds):
            verdict = f"{kind} pays on {results.device} for every M measured"
        else:
            verdict = f"{kind} pays on {results.device} for M = {', '.join(map(str, faster))}"
        lines.append(f"{verdict} (geometric mean over layers, dense is 1: {speedups}).")
    return lines


def best_speedups(rows: Iterable[SpeedRow], kind: str) -> dict[int, float]:
    """Return the best speedup for each M, averaged geometrically over layers."""
    ways = {kind, f"{kind} expanded", *(("cuSPARSELt", "CUTLASS") if kind == "2:4" else ())}
    best: dict[int, dict[tuple[int, int], float]] = {}
    for row in rows:
        if row.way in ways:
            layers = best.setdefault(row.tokens, {})
            layer = (row.outputs, row.inputs)
            layers[layer] = max(layers.get(layer, 0.0), row.dense)
    return {m: statistics.geometric_mean(layers.values()) for m, layers in sorted(best.items())}
