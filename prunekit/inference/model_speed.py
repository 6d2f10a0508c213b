"""Measure generation speed of a model with sparse and with dense layers."""

import inspect
import statistics
from collections.abc import Callable
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.checkpoint.formats import format_named
from prunekit.checkpoint.hub import checkpoint_folder
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import ConfigError
from prunekit.inference.sparse_linear import SparseLinear
from prunekit.models import stock
from prunekit.models.causal import predicts_next_token
from prunekit.models.devices import compute_dtype, stored_dtype, synchronized_seconds
from prunekit.models.hf_config import call_transformers, config_and_class

RUNS = 3
STEPS_TO_CAPTURE = 3  # warm-up calls before capture, in which libraries initialize
Step = Callable[[], None]


def compressible_shapes(path: str) -> list[tuple[int, int]]:
    """Return the [O, I] shapes of compressed or compressible weights."""
    checkpoint = open_checkpoint(checkpoint_folder(path))
    if checkpoint.compressed:
        layouts = (weight.layout for weight in checkpoint.compressed.values())
        return sorted({(layout.outputs, layout.inputs) for layout in layouts})
    matrices = [name for name, e in checkpoint.entries.items() if len(e.shape) == 2]
    fitting = [name for name in matrices if not format_named("bitmask").why_not_storable(
        checkpoint.read([name])[name])]  # fmt: skip
    found = {checkpoint.entries[name].shape for name in fitting}
    return sorted((rows, columns) for rows, columns in found if columns % 4 == 0)


def compare_models(path: str, device: torch.device, prompt: int, new: int) -> list[dict[str, Any]]:
    """Measure speed and memory of the dense and the sparse model.

    Both have the same weights. On a GPU the decode step is captured in a CUDA graph for both, if
    the model supports a static cache; otherwise it is called from Python for both. The entry
    ``cuda_graph`` tells which.

    Args:
        path: Folder or name of the checkpoint.
        device: Device to run on.
        prompt: Prompt tokens, capped by the maximum sequence length.
        new: New tokens.

    Raises:
        ConfigError: It is not a causal language model, or none of its layers is sparse.
    """
    checkpoint = open_checkpoint(checkpoint_folder(path))
    config, kind = config_and_class(checkpoint)
    if kind is None or not predicts_next_token(kind, config):
        name = kind.__name__ if kind else "the base model"
        raise ConfigError(f"{path}: {name} does not generate text.")
    dtype = compute_dtype(stored_dtype(checkpoint), device)
    model = call_transformers(
        checkpoint,
        "cannot open the model",
        lambda: stock.open_model(checkpoint.folder, dtype=dtype).to(device),  # pyright: ignore
    )
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        model = model.dequantize(dtype)
    model = model.eval()
    limit = getattr(model.config, "max_position_embeddings", prompt + new)
    prompt = max(1, min(prompt, limit - new))
    dense = {"layers": "dense", **_measure(model, device, prompt, new)}
    count, kinds = _make_sparse(model)
    if not count:
        raise ConfigError(f"{path}: none of its linear layers has enough zeros. Prune it first.")
    return [dense, {"layers": kinds, "count": count, **_measure(model, device, prompt, new)}]


def _make_sparse(model: PreTrainedModel) -> tuple[int, str]:
    """Replace linears by sparse layers, 2:4 where possible, otherwise bitmask."""
    kinds: dict[str, int] = {}
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear:
            continue
        for kind in ("2:4", "bitmask"):
            if not format_named(kind).why_not_storable(module.weight.detach()):
                model.set_submodule(name, SparseLinear.of(module, kind))
                kinds[kind] = kinds.get(kind, 0) + 1
                break
    return sum(kinds.values()), " and ".join(kinds)


@torch.inference_mode()
def _measure(model: PreTrainedModel, device: torch.device, prompt: int, new: int) -> dict[str, Any]:
    ids = (torch.arange(prompt, device=device) * 7919 % model.config.vocab_size)[None]
    resident = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    use_graph = device.type == "cuda" and bool(getattr(model, "_can_compile_fullgraph", False))
    decoder = (
        _StaticCacheDecoder(model, ids, new, capture_cuda_graph)
        if use_graph
        else _DynamicCacheDecoder(model, ids, new)
    )
    runs = [_time_run(decoder, device) for _ in range(RUNS + 1)][1:]
    prefill, decode = (statistics.median(times) for times in zip(*runs, strict=True))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "prompt": prompt,
        "new": new,
        "cuda_graph": use_graph,
        "prefill_tokens_per_second": prompt / prefill,
        "decode_tokens_per_second": (new - 1) / decode,
        "resident_bytes": sum(resident.values()),
        "peak_device_bytes": peak,
    }


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name of a model's argument and output for its cache.

    transformers 5.24 renames ``past_key_values`` to ``cache``.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class _DynamicCacheDecoder:
    """Greedy decoding with a cache that grows with every token."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, new: int) -> None:
        self.model, self.ids, self.new = cast("Any", model), ids, new
        self.name = cache_argument(model)

    def prefill(self) -> None:
        """Process the prompt and produce the first new token."""
        self.output = self.model(self.ids, use_cache=True)
        self.tokens = [self.output.logits[:, -1:].argmax(-1)]

    def decode(self) -> None:
        """Decode the remaining tokens."""
        for _ in range(self.new - 1):
            cache = {self.name: self.output[self.name]}
            self.output = self.model(self.tokens[-1], **cache, use_cache=True)
            self.tokens.append(self.output.logits[:, -1:].argmax(-1))


class _StaticCacheDecoder:
    """Greedy decoding with a static cache and one step for every token.

    The step can be captured in a CUDA graph, since its tensors keep their addresses.
    """

    def __init__(
        self, model: PreTrainedModel, ids: Tensor, new: int, capture: Callable[[Step], Step]
    ) -> None:
        self.model, self.ids, self.new = cast("Any", model), ids, new
        length = ids.shape[1] + new + STEPS_TO_CAPTURE
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=length)
        self.given = {cache_argument(model): self.cache, "use_cache": True}
        self.token = ids[:, :1].clone()
        self.prefill()
        self.step = capture(self._step)

    def _step(self) -> None:
        output = self.model(self.token, **self.given)
        self.token.copy_(output.logits[:, -1:].argmax(-1))

    def prefill(self) -> None:
        """Process the prompt and produce the first new token."""
        self.cache.reset()
        output = self.model(self.ids, **self.given)
        self.token.copy_(output.logits[:, -1:].argmax(-1))
        self.tokens = [self.token.clone()]

    def decode(self) -> None:
        """Decode the remaining tokens."""
        for _ in range(self.new - 1):
            self.step()
            self.tokens.append(self.token.clone())


def capture_cuda_graph(step: Step) -> Step:
    """Capture a step in a CUDA graph and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(STEPS_TO_CAPTURE):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _time_run(
    decoder: _DynamicCacheDecoder | _StaticCacheDecoder, device: torch.device
) -> tuple[float, float]:
    """Return the seconds of prefill and of decoding.

    Decoding starts after the first new token, which the prefill produces.
    """
    began = synchronized_seconds(device)
    decoder.prefill()
    prefilled = synchronized_seconds(device)
    decoder.decode()
    return prefilled - began, synchronized_seconds(device) - prefilled
