"""Whether a pruned model is faster with sparse layers than with dense ones: the whole of it."""

import statistics
from collections.abc import Callable
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.checkpoint.formats import format_named
from prunekit.checkpoint.hub import find
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import ConfigError
from prunekit.inference.sparse_linear import SparseLinear
from prunekit.models.devices import compute_dtype, now, stored_dtype

RUNS = 3
STEPS_TO_CAPTURE = 3  # calls before a step is captured: libraries set themselves up in the first
Step = Callable[[], None]


def shapes_of(path: str) -> list[tuple[int, int]]:
    """Return the shapes, outputs first, of what is compressed in a checkpoint or could be."""
    checkpoint = open_checkpoint(find(path))
    if checkpoint.packed:
        stored = (weight.stored for weight in checkpoint.packed.values())
        return sorted({(said.outputs, said.inputs) for said in stored})
    matrices = [name for name, e in checkpoint.entries.items() if len(e.shape) == 2]
    fitting = [name for name in matrices if not format_named("bitmask").why_not_storable(
        checkpoint.read([name])[name])]  # fmt: skip
    found = {checkpoint.entries[name].shape for name in fitting}
    return sorted((rows, columns) for rows, columns in found if columns % 4 == 0)


def compare(path: str, device: torch.device, prompt: int, new: int) -> list[dict[str, Any]]:
    """Return prefill and decode in tokens a second and memory, dense first, then sparse.

    Both are the same model with the same zeros. On a GPU the step that writes a token is captured
    in a CUDA graph on both sides, where the model can have a cache of fixed length; else it is
    called from Python on both. Each entry says which.

    Raises:
        ConfigError: It is no causal language model, or none of its layers is sparse.
    """
    checkpoint = open_checkpoint(find(path))
    name = (checkpoint.config.get("architectures") or [""])[0]
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise ConfigError(f"{path}: {name or 'the base model'} does not generate text.")
    dtype = compute_dtype(stored_dtype(checkpoint), device)
    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, name).from_pretrained(checkpoint.folder, dtype=dtype).to(device)
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        model = model.dequantize(dtype)
    model = model.eval()
    limit = getattr(model.config, "max_position_embeddings", prompt + new)
    prompt = max(1, min(prompt, limit - new))
    dense = {"layers": "dense", **_measured(model, device, prompt, new)}
    count, kinds = _make_sparse(model)
    if not count:
        raise ConfigError(f"{path}: none of its linear layers has enough zeros. Prune it first.")
    return [dense, {"layers": kinds, "count": count, **_measured(model, device, prompt, new)}]


def _make_sparse(model: PreTrainedModel) -> tuple[int, str]:
    """Put sparse layers in the place of linear ones, as 2:4 where that fits, else as bitmask."""
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
def _measured(
    model: PreTrainedModel, device: torch.device, prompt: int, new: int
) -> dict[str, Any]:
    ids = (torch.arange(prompt, device=device) * 7919 % model.config.vocab_size)[None]
    resident = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    captured = device.type == "cuda" and bool(getattr(model, "_can_compile_fullgraph", False))
    writer = _Fixed(model, ids, new, capture) if captured else _Growing(model, ids, new)
    runs = [_run(writer, device) for _ in range(RUNS + 1)][1:]
    prefill, decode = (statistics.median(times) for times in zip(*runs, strict=True))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "prompt": prompt,
        "new": new,
        "cuda_graph": captured,
        "prefill_tokens_per_second": prompt / prefill,
        "decode_tokens_per_second": (new - 1) / decode,
        "resident_bytes": sum(resident.values()),
        "peak_device_bytes": peak,
    }


class _Growing:
    """Reads a prompt and writes greedily, the cache growing with every token."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, new: int) -> None:
        self.model, self.ids, self.new = cast("Any", model), ids, new

    def read(self) -> None:
        """Read the prompt, which gives the first new token."""
        self.said = self.model(self.ids, use_cache=True)
        self.tokens = [self.said.logits[:, -1:].argmax(-1)]

    def write(self) -> None:
        """Write the other tokens."""
        for _ in range(self.new - 1):
            cache = self.said.past_key_values
            self.said = self.model(self.tokens[-1], past_key_values=cache, use_cache=True)
            self.tokens.append(self.said.logits[:, -1:].argmax(-1))


class _Fixed:
    """Does the same with a cache of fixed length, so that one captured step writes every token."""

    def __init__(
        self, model: PreTrainedModel, ids: Tensor, new: int, captured: Callable[[Step], Step]
    ) -> None:
        self.model, self.ids, self.new = cast("Any", model), ids, new
        length = ids.shape[1] + new + STEPS_TO_CAPTURE
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=length)
        self.token = ids[:, :1].clone()
        self.read()
        self.step = captured(self._step)

    def _step(self) -> None:
        said = self.model(self.token, past_key_values=self.cache, use_cache=True)
        self.token.copy_(said.logits[:, -1:].argmax(-1))

    def read(self) -> None:
        """Read the prompt, which gives the first new token."""
        self.cache.reset()
        said = self.model(self.ids, past_key_values=self.cache, use_cache=True)
        self.token.copy_(said.logits[:, -1:].argmax(-1))
        self.tokens = [self.token.clone()]

    def write(self) -> None:
        """Write the other tokens."""
        for _ in range(self.new - 1):
            self.step()
            self.tokens.append(self.token.clone())


def capture(step: Step) -> Step:
    """Return a replay of a step that was captured in a CUDA graph, after a few calls of it."""
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


def _run(writer: _Growing | _Fixed, device: torch.device) -> tuple[float, float]:
    """Return the seconds of reading a prompt, and of writing after the first new token."""
    began = now(device)
    writer.read()
    read = now(device)
    writer.write()
    return read - began, now(device) - read
