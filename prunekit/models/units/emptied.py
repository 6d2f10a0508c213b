"""Attentions and feed-forwards without units.

Their linears have no weights any more; of the output the bias of the linear that read the units is
left. An attention computes no scores then. It still enters one zero per token into the cache, since
transformers counts the tokens there, often those of the first attention, and an entry without
elements would count as none. Where it is the first one of a stack with a shared position bias, it
still computes that for the others.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from prunekit.architectures import Attention, FeedForward, Stack, find_architecture
from prunekit.architectures.adapters import base_layer
from prunekit.architectures.coverage import base_model_prefix, has_module
from prunekit.architectures.empty_linear import EmptyLinear
from prunekit.models.orientation import features

if TYPE_CHECKING:
    from jaxtyping import Float
    from transformers import PreTrainedModel

    from prunekit.models.units.kinds import Kind


def is_empty(block: nn.Module, declared: Attention | FeedForward) -> bool:
    """Return whether an attention or feed-forward of a block has no units."""
    return isinstance(base_layer(block.get_submodule(declared.output)), EmptyLinear)


def emptied(model: PreTrainedModel, kind: Kind) -> list[str]:
    """Return the attentions or feed-forwards without units, by group name."""
    if not any(isinstance(module, EmptyLinear) for module in model.modules()):
        return []  # without a look at the architecture, which may take a forward
    base, prefix = model.base_model, base_model_prefix(model)
    return [
        f"{prefix}{stack.blocks}.{number}.{path}"
        for stack in find_architecture(model).stacks
        for number, block in base.get_submodule(stack.blocks).named_children()
        for path, declared in _parts(stack, kind)
        if has_module(block, declared.output) and is_empty(block, declared)
    ]


def _parts(stack: Stack, kind: Kind) -> list[tuple[str, Attention | FeedForward]]:
    """Return the attentions or feed-forwards of a block, by name."""
    if kind == "heads":
        return [(each.module, each) for each in stack.attentions]
    return [(each.output, each) for each in stack.feed_forwards]


def empty(block: nn.Module, declared: Attention | FeedForward) -> None:
    """Remove all units of an attention or feed-forward, in place."""
    is_attention = isinstance(declared, Attention)
    names = (declared.query, declared.key, declared.value) if is_attention else declared.inputs
    for path in dict.fromkeys(names):
        if has_module(block, path):
            inputs = features(block.get_submodule(path))[1]
            block.set_submodule(path, EmptyLinear(inputs, 0, None))
    reader: Any = base_layer(block.get_submodule(declared.output))
    block.set_submodule(declared.output, EmptyLinear(0, features(reader)[0], reader.bias))
    if is_attention:
        _stop_attending(block.get_submodule(declared.module), declared)


def _stop_attending(module: nn.Module, declared: Attention) -> None:
    """Replace an attention's forward and its norms of queries and keys."""
    path = declared.output.removeprefix(f"{declared.module}.")
    reader = path if has_module(module, path) else None
    for name, child in module.named_children():  # such as norms of queries
        needed = name == declared.bias or path.split(".")[0] == name
        if not needed and next(child.parameters(), None) is not None:
            setattr(module, name, nn.Identity())
    # A partial, unlike a function of this module, is copied and pickled with the attention.
    module.forward = partial(_forward, module, reader=reader, bias=declared.bias)


def _forward(
    module: Any,  # noqa: ANN401  attributes differ by class
    *args: Any,  # noqa: ANN401
    reader: str | None,
    bias: str | None,
    **kwargs: Any,  # noqa: ANN401
) -> tuple[Tensor | None, ...]:
    """Return the output of an attention without heads, and its attention weights.

    Args:
        module: The attention.
        args: Arguments of the call; the hidden states come first.
        reader: Path below the attention of the linear that read the heads, or None if it is outside
            of it; the output then has no features.
        bias: As in its declaration. With a position bias, that is returned too.
        kwargs: Keyword arguments of the call.
    """
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    nothing = hidden[..., :0]
    output = module.get_submodule(reader)(nothing) if reader else nothing
    positions, context = kwargs.get("position_bias"), kwargs.get("key_value_states")
    if context is not None:  # cross-attention, whose keys nobody counts
        return output, positions, _weights(module, hidden, context.shape[1])
    given = (each for each in (*args, *kwargs.values()) if isinstance(each, Cache))
    past, keys = _count_tokens(next(given, None), hidden, module)
    weights = _weights(module, hidden, keys)
    if bias is None:
        return output, weights
    if positions is None and isinstance(getattr(module, bias, None), nn.Embedding):
        positions = module.compute_bias(
            hidden.shape[1], keys, device=hidden.device, past_seen_tokens=past
        )
    return output, positions, weights


def _weights(
    module: Any,  # noqa: ANN401
    hidden: Float[Tensor, "B T D"],
    keys: int,
) -> Float[Tensor, "B 0 T K"] | None:
    """Return the attention weights of no heads, or None.

    transformers lists those of all layers, and leaves out layers that return none.

    Args:
        module: The attention.
        hidden: Its input.
        keys: Number of keys.
    """
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation is None or "eager" not in implementation:
        return None
    return hidden.new_zeros(len(hidden), 0, hidden.shape[1], keys)


def _count_tokens(
    cache: Cache | None,
    hidden: Float[Tensor, "B T D"],
    module: Any,  # noqa: ANN401
) -> tuple[Any, int]:
    """Enter tokens into the cache; return the numbers before and in total.

    Args:
        cache: The cache, if there is one.
        hidden: Hidden states of the new tokens.
        module: The attention, whose ``layer_idx`` is its place in the cache.
    """
    if cache is None:
        return 0, hidden.shape[1]
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    past = cache.get_seq_length(module.layer_idx)
    if isinstance(past, Tensor):  # of a static cache, which changes it in place
        past = past.clone()
    entry = hidden.new_zeros(len(hidden), 1, hidden.shape[1], 1)
    keys, _ = cache.update(entry, entry, module.layer_idx)
    return past, keys.shape[-2]
