"""Trace one forward of a model on fake tensors.

Fake tensors have shapes and identity but no data and no memory, so a model of any size is traced
in seconds. (The meta device is not enough: there transformers reads mask values unless it knows
that it is traced.)

Shapes: T tokens, K experts per token, D features.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from prunekit.architectures.attention_trace import AttentionTrace, storage_id, trace_attention
from prunekit.architectures.block_lists import BlockList, own_embeddings
from prunekit.architectures.coverage import named_linears
from prunekit.architectures.expert_layout import ExpertLayout, fused_experts, is_list
from prunekit.architectures.features import FEATURES, FRAMES, feature_shape, reads_features
from prunekit.architectures.origins import (
    EMBEDDINGS,
    TOKENS,
    BlockChain,
    Origins,
    TensorIdentity,
    identity,
    mark,
    origins,
)
from prunekit.architectures.probed_feed_forwards import PointwiseTrace, Sources

# Raised by a forward that needs the values of fake tensors, or other inputs than it is given.
FORWARD_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
IMPLEMENTATION = "prunekit_tracing"
"""Name under which the traced experts are registered in transformers."""


@dataclass
class ForwardTrace:
    """One forward of a model.

    Attributes:
        model: The model, with fake tensors.
        stack: The module of it that ran.
        inputs: Its inputs.
        reads_ids: It ran from token ids, and does not run from embeddings.
        reads: Identity of the input of each linear and module of fused experts, in the order of
            their first call; equal ones mean the same tensor.
        repeated: Linears that were called more than once.
        experts: Layout of each module of fused experts that was called.
        routers: Names of the weights that choose the experts.
        chain: Inputs of the blocks.
        reads_table: A forward from embeddings read the table of embeddings.
        attention: Calls of the attention function.
        pointwise: Linears whose inputs depend on outputs of others entry by entry.
        features: Width of the output.
    """

    model: PreTrainedModel
    stack: nn.Module
    inputs: dict[str, Tensor]
    reads_ids: bool = False
    reads: dict[str, TensorIdentity] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    experts: dict[str, ExpertLayout] = field(default_factory=dict)
    routers: set[str] = field(default_factory=set)
    chain: BlockChain = field(default_factory=lambda: BlockChain(nn.ModuleList()))
    reads_table: bool = False
    attention: AttentionTrace = field(default_factory=AttentionTrace)
    pointwise: PointwiseTrace = field(default_factory=PointwiseTrace)
    features: int = 0


_traces: list[tuple[ForwardTrace, dict[nn.Module, str]]] = []


@contextmanager
def traced_forward(
    base: PreTrainedModel, found: BlockList, encoded: int | None = None
) -> Iterator[ForwardTrace]:
    """Trace a forward of a stack, from embeddings or token ids.

    It runs in a copy of the model; from token ids too where a block reads the embeddings beside the
    hidden states. Inside the context tensors are fake, so the copy can be changed and run again.

    Args:
        base: The model without a head.
        found: The blocks and the module that runs them.
        encoded: Width of the hidden states that its blocks attend to, if any.

    Raises:
        RuntimeError, TypeError, ValueError, AttributeError, LookupError: It runs from neither.
    """
    with torch.inference_mode(mode=False), torch.no_grad(), FakeTensorMode():
        yield _first_that_runs(partial(_trace, base, found, encoded))


def _first_that_runs(trace: Callable[..., ForwardTrace]) -> ForwardTrace:
    errors: list[Exception] = []
    for traced, reads_ids in ((True, False), (True, True), (False, False), (False, True)):
        # Few models choose attention in a table of their own, in which the traced one is missing.
        if not traced and not any("prunekit_probing" in str(error) for error in errors):
            break
        try:
            found = trace(reads_ids=reads_ids, traced=traced)
        except FORWARD_ERRORS as error:
            errors.append(error)
        else:
            reads = found.chain.embedded or found.reads_table
            again = reads and not found.chain.broken
            return trace(reads_ids=True, traced=traced) if again else found
    raise errors[0]


def run_again(trace: ForwardTrace) -> None:
    """Run the traced copy again, with its attention traced anew.

    Raises:
        RuntimeError, TypeError, ValueError, AttributeError, LookupError: It does not run.
    """
    again = ForwardTrace(trace.model, trace.stack, trace.inputs, trace.reads_ids)
    names: dict[nn.Module, str] = {module: name for name, module in trace.model.named_modules()}
    with trace_attention(trace.model, trace.model.config):
        _traces.append((again, names))
        try:
            _run(again)
        finally:
            _traces.pop()


def _trace(
    base: PreTrainedModel,
    found: BlockList,
    encoded: int | None,
    *,
    reads_ids: bool,
    traced: bool,
) -> ForwardTrace:
    config = _config(base, found)
    recorded = trace_attention(base, config) if traced else nullcontext(AttentionTrace())
    with recorded as attention:
        with no_init_weights():
            fake = type(base)(config).eval()
        names: dict[nn.Module, str] = {module: name for name, module in fake.named_modules()}
        stack = fake.get_submodule(found.module)
        inputs = _inputs(fake, stack, encoded, reads_ids=reads_ids)
        trace = ForwardTrace(fake, stack, inputs, reads_ids, attention=attention)
        kept: list[Tensor] = []
        handles = [
            linear.register_forward_hook(record_into(trace, name, kept))
            for name, linear in named_linears(fake).items()
        ]
        trace.chain = BlockChain(fake.get_submodule(found.blocks))
        table = None if reads_ids else own_embeddings(stack)
        if isinstance(table, nn.Module):
            handles.append(
                table.register_forward_pre_hook(lambda *_: setattr(trace, "reads_table", True))
            )
        for name, layout in fused_experts(fake).items():
            module: Any = fake.get_submodule(name)
            if layout.call == "interface":
                module.config._experts_implementation = IMPLEMENTATION
            else:
                module.forward = partial(_experts, module)
        for module in filter(is_list, fake.modules()):
            module.forward = partial(_listed_experts, module)
        for linear in named_linears(fake).values():
            # Some are moved to another dtype in each forward, which fake tensors do not allow.
            linear.to = partial(_itself, linear)  # pyright: ignore
        _traces.append((trace, names))
        try:
            matrices = {storage_id(each.weight) for each in named_linears(fake).values()}  # pyright: ignore
            with Origins(fake), Sources(trace.pointwise, lambda x: storage_id(x) in matrices):
                _run(trace)
        finally:
            _traces.pop()
            trace.chain.remove()
            for handle in handles:
                handle.remove()
    return trace


def _config(base: PreTrainedModel, found: BlockList) -> Any:  # noqa: ANN401
    """Return the copy's config; a sound encoder makes ``TOKENS`` tokens with it."""
    config: Any = copy.deepcopy(base.config)
    config.use_cache = False
    if reads_features(base.get_submodule(found.module)):
        setattr(config, FRAMES, TOKENS)
    return config


def record_into(trace: ForwardTrace, name: str, kept: list[Tensor]) -> Callable[..., None]:
    """Return a hook that records calls of a linear; ``kept`` holds tensors."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:  # noqa: ANN401
        if name in trace.reads:
            trace.repeated.add(name)
            return
        trace.reads[name] = identity(inputs[0])
        tensors = [inputs[0], *(each for each in tree_leaves(output) if isinstance(each, Tensor))]
        attention = trace.attention
        attention.reads[name], attention.writes[name] = map(storage_id, tensors[:2])
        trace.pointwise.note(name, *tensors[:2])
        # Keep tensors alive: a later tensor could reuse the identity of a freed one.
        kept.extend(tensors)

    return hook


def _inputs(
    fake: PreTrainedModel, stack: nn.Module, encoded: int | None, *, reads_ids: bool
) -> dict[str, Tensor]:
    if reads_features(stack):
        given = {FEATURES: torch.empty(1, *feature_shape(stack))}
    elif reads_ids:
        given = {"input_ids": torch.zeros(1, TOKENS, dtype=torch.int64)}
    else:
        table: Any = own_embeddings(stack) or fake.get_input_embeddings()
        given = {"inputs_embeds": torch.empty(1, TOKENS, next(table.parameters()).shape[1])}
        mark(given["inputs_embeds"], {EMBEDDINGS})
    if encoded is not None:
        given["encoder_hidden_states"] = torch.empty(1, TOKENS, encoded)
    return given


def _run(trace: ForwardTrace) -> None:
    # A failing forward is an expected outcome here; torch would log a page about it.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    options = {"use_cache": False} if trace.stack is trace.model else {}
    try:
        output = trace.stack(**trace.inputs, **options)
    finally:
        log.disabled = before
    hidden = next(each for each in tree_leaves(output) if isinstance(each, Tensor))
    trace.features = hidden.shape[-1]


def _itself(module: nn.Module, *_: object) -> nn.Module:
    return module


def _listed_experts(module: nn.Module, hidden: Float[Tensor, "T D"], *routing: Tensor) -> Tensor:
    """Call each expert of a list once, on tokens of its own."""
    trace, names = _traces[-1]
    trace.routers |= _routers(names[module], routing)
    outputs = [expert(hidden.clone()) for expert in module.children()]
    return outputs[-1]


def _routers(experts: str, tensors: Iterable[Tensor]) -> set[str]:
    """Return the weights in the module around experts that choose them."""
    around = experts.rpartition(".")[0]
    found = {weight for tensor in tensors for weight in origins(tensor)}
    inside = {weight for weight in found if weight.startswith(f"{around}.")}
    return {weight for weight in inside if not weight.startswith(f"{experts}.")}


def _experts(module: nn.Module, hidden: Float[Tensor, "T D"], *routing: Tensor) -> Tensor:
    """Note the call of a module of experts.

    Routers are the weights in the module around the experts from which the choice was computed, or
    with which the hidden states were scaled for each expert.
    """
    trace, names = _traces[-1]
    name = names[module]
    trace.reads[name] = identity(hidden)
    trace.experts[name] = fused_experts(module)[""]
    trace.routers |= _routers(name, routing or [hidden])
    return torch.empty_like(hidden)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)
