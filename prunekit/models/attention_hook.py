"""Attention as the model computes it, seen at the one place where all families compute it.

transformers calls one function with the queries and keys after rotary embedding; ours calls the
function that would have been called, so that the result is the same to the bit, and shows an
observer what was read. No matrix of queries × keys is made for it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from prunekit.errors import CheckpointError

Observer = Callable[..., None]
"""Called with the module, query, key, mask, and what else the attention function is given."""

_OURS = {"sdpa": "prunekit_sdpa", "eager": "prunekit_eager"}


def implement(model: PreTrainedModel) -> None:
    """Let all attention of a model run through ours, for good.

    Raises:
        CheckpointError: It runs in an implementation that ours does not stand for.
    """
    for config in configs(model):
        theirs = config._attn_implementation or "eager"
        if theirs in _OURS.values():
            continue
        if theirs not in _OURS:
            raise CheckpointError(
                f"{type(model).__name__}: attention runs in {theirs!r}; heads can be observed in "
                f"{' and '.join(_OURS)}. Call model.set_attn_implementation first."
            )
        config._attn_implementation = _OURS[theirs]


def refuse_unseen(modules: Iterable[nn.Module]) -> None:
    """Refuse attention that no registered function computes.

    Raises:
        CheckpointError: Names the first.
    """
    for module in modules:
        if not hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS"):
            raise CheckpointError(
                f"{type(module).__name__}: transformers {transformers.__version__} computes it "
                "outside of its AttentionInterface, where it cannot be observed. A newer "
                "transformers may."
            )


@contextmanager
def observed(model: PreTrainedModel, observers: Mapping[nn.Module, Observer]) -> Iterator[None]:
    """Call each attention's observer whenever it runs; the model computes what it did before.

    Raises:
        CheckpointError: See :func:`implement` and :func:`refuse_unseen`.
    """
    refuse_unseen(observers)
    before = [(config, config._attn_implementation) for config in configs(model)]
    try:
        implement(model)
        for module, observer in observers.items():
            module.__dict__["observer"] = observer
        yield
    finally:
        for module in observers:
            module.__dict__.pop("observer", None)
        for config, implementation in before:
            config._attn_implementation = implementation


def configs(model: PreTrainedModel) -> list[Any]:
    """Return every config that a module of the model reads, each once."""
    found = [module.config for module in model.modules() if hasattr(module, "config")]
    return list({id(config): config for config in found}.values())


def _sdpa(module: nn.Module, *tensors: Tensor | None, **given: Any) -> tuple[Tensor, Any]:  # noqa: ANN401
    return _call(sdpa_attention_forward, module, tensors, given)


def _eager(module: nn.Module, *tensors: Tensor | None, **given: Any) -> tuple[Tensor, Any]:  # noqa: ANN401
    theirs = sys.modules[type(module).__module__].eager_attention_forward
    return _call(theirs, module, tensors, given)


def _call(
    function: Callable[..., Any],
    module: nn.Module,
    tensors: tuple[Tensor | None, ...],
    given: dict[str, Any],
) -> tuple[Tensor, Any]:
    kept = getattr(module, "kept_heads", None)
    if kept is not None:  # the bias has a column for each head that the first block once had
        given["position_bias"] = given["position_bias"][:, kept]
    observer = module.__dict__.get("observer")
    if observer is not None:
        query, key, _, *rest = tensors
        observer(module, query, key, rest[0] if rest else given["attention_mask"], given)
    return function(module, *tensors, **given)


AttentionInterface.register(_OURS["sdpa"], _sdpa)
AttentionInterface.register(_OURS["eager"], _eager)
AttentionMaskInterface.register(_OURS["sdpa"], sdpa_mask)
AttentionMaskInterface.register(_OURS["eager"], eager_mask)
