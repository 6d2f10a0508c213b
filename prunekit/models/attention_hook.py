"""Hook into the attention function of transformers to observe queries and keys.

transformers calls one registered function with the queries and keys after rotary embedding. The
function registered here passes these tensors to an observer and calls the original function, so
results are bit-identical. It materializes no query × key matrix.
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
"""Called with the module, query, key, mask and the keyword arguments of the attention function."""

_HOOKED = {"sdpa": "prunekit_sdpa", "eager": "prunekit_eager"}


def use_hooked_attention(model: PreTrainedModel) -> None:
    """Switch all attention of a model to the hooked implementations permanently.

    Raises:
        CheckpointError: The model uses an implementation that has no hooked version.
    """
    for config in module_configs(model):
        original = config._attn_implementation or "eager"
        if original in _HOOKED.values():
            continue
        if original not in _HOOKED:
            raise CheckpointError(
                f"{type(model).__name__}: attention runs in {original!r}; heads can be observed in "
                f"{' and '.join(_HOOKED)}. Call model.set_attn_implementation first."
            )
        config._attn_implementation = _HOOKED[original]


def check_observable(modules: Iterable[nn.Module]) -> None:
    """Check that the attention modules use the transformers attention interface.

    Raises:
        CheckpointError: A module computes attention by itself; the first one is named.
    """
    for module in modules:
        if not hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS"):
            raise CheckpointError(
                f"{type(module).__name__}: transformers {transformers.__version__} computes it "
                "outside of its AttentionInterface, where it cannot be observed. A newer "
                "transformers may."
            )


@contextmanager
def observe_attention(
    model: PreTrainedModel, observers: Mapping[nn.Module, Observer]
) -> Iterator[None]:
    """Call the observer of each attention module inside the context.

    Raises:
        CheckpointError: The attention cannot be observed; see :func:`use_hooked_attention` and
            :func:`check_observable`.
    """
    check_observable(observers)
    before = [(config, config._attn_implementation) for config in module_configs(model)]
    try:
        use_hooked_attention(model)
        for module, observer in observers.items():
            module.__dict__["observer"] = observer
        yield
    finally:
        for module in observers:
            module.__dict__.pop("observer", None)
        for config, implementation in before:
            config._attn_implementation = implementation


def module_configs(model: PreTrainedModel) -> list[Any]:
    """Return the distinct configs that the modules of the model hold."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return list({id(config): config for config in configs}.values())


def _sdpa(module: nn.Module, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, Any]:  # noqa: ANN401
    return _call(sdpa_attention_forward, module, tensors, options)


def _eager(module: nn.Module, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, Any]:  # noqa: ANN401
    original = sys.modules[type(module).__module__].eager_attention_forward
    return _call(original, module, tensors, options)


def _call(
    function: Callable[..., Any],
    module: nn.Module,
    tensors: tuple[Tensor | None, ...],
    options: dict[str, Any],
) -> tuple[Tensor, Any]:
    kept = getattr(module, "kept_heads", None)
    if kept is not None:  # the bias has a column for each original head of the first block
        options["position_bias"] = options["position_bias"][:, kept]
    observer = module.__dict__.get("observer")
    if observer is not None:
        query, key, _, *rest = tensors
        observer(module, query, key, rest[0] if rest else options["attention_mask"], options)
    return function(module, *tensors, **options)


AttentionInterface.register(_HOOKED["sdpa"], _sdpa)
AttentionInterface.register(_HOOKED["eager"], _eager)
AttentionMaskInterface.register(_HOOKED["sdpa"], sdpa_mask)
AttentionMaskInterface.register(_HOOKED["eager"], eager_mask)
