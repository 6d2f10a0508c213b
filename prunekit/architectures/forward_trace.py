"""Trace one forward of a model on fake tensors.

Fake tensors have shapes and identity but no data and no memory, so a model of any size is traced
in seconds. (The meta device is not enough: there transformers reads mask values unless it knows
that it is traced.)

Shapes: T tokens, K experts per token, D features.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from typing_extensions import override

from prunekit.architectures.coverage import named_linears
from prunekit.architectures.expert_layout import ExpertLayout, fused_experts
from prunekit.architectures.probed_heads import AttentionTrace, storage_id, trace_attention

# Raised by a forward that needs the values of fake tensors, or other inputs than it is given.
FORWARD_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
IMPLEMENTATION = "prunekit_tracing"
"""Name under which the traced experts are registered in transformers."""
SHAPE_ONLY = ("_like", "new_")
"""Parts of the names of operations that read the shape of a tensor alone."""
TOKENS = 4
EMBEDDINGS = "inputs_embeds"

TensorIdentity = tuple[object, ...]


@dataclass
class ForwardTrace:
    """One forward of a model.

    Attributes:
        model: The model, with fake tensors.
        reads_ids: It ran from token ids, and does not run from embeddings.
        reads: Identity of the input of each linear and module of fused experts, in the order of
            their first call; equal ones mean the same tensor.
        repeated: Linears that were called more than once.
        experts: Layout of each module of fused experts that was called.
        routers: Names of the weights that choose the experts.
        embedded: Blocks that read the embeddings beside the hidden states, and the table of
            embeddings if it was read by a forward from embeddings.
        broken: Blocks whose input is not the output of the block before, or is not [1, T, D].
        attention: Calls of the attention function.
    """

    model: PreTrainedModel
    reads_ids: bool = False
    reads: dict[str, TensorIdentity] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    experts: dict[str, ExpertLayout] = field(default_factory=dict)
    routers: set[str] = field(default_factory=set)
    embedded: set[str] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)
    attention: AttentionTrace = field(default_factory=AttentionTrace)


_traces: list[tuple[ForwardTrace, dict[nn.Module, str]]] = []


@contextmanager
def traced_forward(base: PreTrainedModel, blocks: str) -> Iterator[ForwardTrace]:
    """Trace a forward of a model's copy, from embeddings or token ids.

    From token ids too where a block reads the embeddings beside the hidden states. Inside the
    context tensors are fake, so the copy can be changed and run again.

    Args:
        base: The model without a head.
        blocks: Name of its list of blocks.

    Raises:
        RuntimeError, TypeError, ValueError, AttributeError, LookupError: It runs from neither.
    """
    config = copy.deepcopy(base.config)
    with torch.inference_mode(mode=False), torch.no_grad(), FakeTensorMode():
        try:
            trace = _trace(base, config, blocks, reads_ids=False)
            if trace.embedded:
                trace = _trace(base, config, blocks, reads_ids=True)
        except FORWARD_ERRORS as error:
            try:
                trace = _trace(base, config, blocks, reads_ids=True)
            except FORWARD_ERRORS:
                raise error from None
        yield trace


def run_again(trace: ForwardTrace) -> None:
    """Run the traced copy again, with its attention traced anew.

    Raises:
        RuntimeError, TypeError, ValueError, AttributeError, LookupError: It does not run.
    """
    with trace_attention(type(trace.model), trace.model.config):
        _run(trace.model, reads_ids=trace.reads_ids)


def _trace(
    base: PreTrainedModel,
    config: Any,  # noqa: ANN401
    blocks: str,
    *,
    reads_ids: bool,
) -> ForwardTrace:
    with trace_attention(type(base), config) as attention:
        with no_init_weights():
            fake = type(base)(config).eval()
        names: dict[nn.Module, str] = {module: name for name, module in fake.named_modules()}
        trace = ForwardTrace(fake, reads_ids, attention=attention)
        kept: list[Tensor] = []
        handles = [
            linear.register_forward_hook(_record_into(trace, name, kept))
            for name, linear in named_linears(fake).items()
        ]
        handles += _watch_chain(trace, fake.get_submodule(blocks), kept)
        table = None if reads_ids else fake.get_input_embeddings()
        if isinstance(table, nn.Module):
            handles.append(
                table.register_forward_pre_hook(lambda *_: trace.embedded.add(EMBEDDINGS))
            )
        for name in fused_experts(fake):
            fake.get_submodule(name).config._experts_implementation = IMPLEMENTATION  # pyright: ignore
        _traces.append((trace, names))
        try:
            with _Origins(fake):
                _run(fake, reads_ids=reads_ids)
        finally:
            _traces.pop()
            for handle in handles:
                handle.remove()
    return trace


def _record_into(trace: ForwardTrace, name: str, kept: list[Tensor]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:  # noqa: ANN401
        if name in trace.reads:
            trace.repeated.add(name)
            return
        trace.reads[name] = identity(inputs[0])
        tensors = [inputs[0], *(each for each in tree_leaves(output) if isinstance(each, Tensor))]
        attention = trace.attention
        attention.reads[name], attention.writes[name] = map(storage_id, tensors[:2])
        # Keep tensors alive: a later tensor could reuse the identity of a freed one.
        kept.extend(tensors)

    return hook


def _run(fake: PreTrainedModel, *, reads_ids: bool) -> None:
    if reads_ids:
        given = {"input_ids": torch.zeros(1, TOKENS, dtype=torch.int64)}
    else:
        width = next(fake.get_input_embeddings().parameters()).shape[1]
        given = {"inputs_embeds": torch.empty(1, TOKENS, width)}
        _mark(given["inputs_embeds"], {EMBEDDINGS})
    # A failing forward is an expected outcome here; torch would log a page about it.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        fake(**given, use_cache=False)
    finally:
        log.disabled = before


def identity(x: Tensor) -> TensorIdentity:
    """Return a key that is equal for views of the same data.

    The batch has one sample, so merging the batch and token dimensions changes nothing. The version
    distinguishes a tensor from itself after an in-place operation.
    """
    rows = x.squeeze()
    storage = rows.untyped_storage()._cdata, rows.storage_offset()
    return *storage, rows.shape, rows.stride(), rows._version


class _Origins(TorchDispatchMode):
    """Notes on each tensor which weights were multiplied for it last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {
            storage_id(weight): name for name, weight in model.named_parameters() if weight.ndim > 1
        }

    @override
    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        own = {self._weights.get(storage_id(each)) for each in inputs} - {None}
        found = own or set().union(*map(_origins, inputs))
        if any(part in func.overloadpacket.__name__ for part in SHAPE_ONLY):
            found = set()
        for each in tree_leaves(output):
            if isinstance(each, Tensor):
                _mark(each, found)
        return output


def _watch_chain(trace: ForwardTrace, blocks: nn.Module, kept: list[Tensor]) -> list[Any]:
    """Note blocks whose hidden states another module changes, and their other inputs."""
    outputs: list[Tensor] = []

    def before(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = dict(kwargs)
        hidden = args[0] if args else others.pop("hidden_states", None)
        plain = isinstance(hidden, Tensor) and hidden.shape[:-1] == (1, TOKENS)
        if not plain or (outputs and identity(outputs[-1]) != identity(hidden)):
            trace.broken.append(name)
        for each in tree_leaves((args[1:], others)):
            if isinstance(each, Tensor) and EMBEDDINGS in _origins(each):
                trace.embedded.add(name)

    def after(_: nn.Module, __: tuple[Any, ...], result: Any) -> None:  # noqa: ANN401
        output = result[0] if isinstance(result, tuple | list) else result
        kept.append(output)
        outputs.append(output)

    handles = []
    for name, block in blocks.named_children():
        handles.append(block.register_forward_pre_hook(partial(before, name), with_kwargs=True))
        handles.append(block.register_forward_hook(after))
    return handles


def _mark(x: Any, origins: set[Any]) -> None:  # noqa: ANN401  a tensor with one more attribute
    x.origins = origins


def _origins(x: Tensor) -> set[str]:
    return x.__dict__.get("origins", set())


def _experts(module: nn.Module, hidden: Float[Tensor, "T D"], *routing: Tensor) -> Tensor:
    """Note the call of a module of experts.

    Routers are the weights in the module around the experts from which the choice was computed.
    """
    trace, names = _traces[-1]
    name = names[module]
    trace.reads[name] = identity(hidden)
    trace.experts[name] = fused_experts(module)[""]
    around = name.rpartition(".")[0]
    trace.routers |= {
        weight
        for tensor in routing
        for weight in _origins(tensor)
        if weight.startswith(f"{around}.") and not weight.startswith(f"{name}.")
    }
    return torch.empty_like(hidden)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)
