"""Kinds of parameters that can be trained alone, or beside adapters."""

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel

from prunekit.errors import PrunekitError
from prunekit.models.units.experts import expert_groups


def chosen_parameters(model: PreTrainedModel, kinds: Sequence[str]) -> list[nn.Parameter]:
    """Return all parameters of some kinds.

    Args:
        model: The model, which may have adapters.
        kinds: "norms" (of modules whose class says so), "biases", "head" (all outside of the base
            model but output embeddings) and "routers" (of mixtures of experts).
    """
    found: dict[nn.Parameter, None] = {}
    outside = {*model.modules()} - {*model.base_model.modules(), model.get_output_embeddings()}
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            wanted = (
                ("norms" in kinds and is_norm and parameter.ndim == 1)
                or ("biases" in kinds and name == "bias")
                or ("head" in kinds and module in outside)
            )
            if wanted:
                found[parameter] = None
    if "routers" in kinds:
        found |= dict.fromkeys(_routers(model))
    return [*found]


def _routers(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Yield the parameters of all routers; none if no expert is understood."""
    try:
        groups = expert_groups(model)
    except PrunekitError:
        return
    for group in groups:
        for axis in group.router.axes:
            if axis.is_parameter:
                yield axis.module._parameters[axis.name]  # pyright: ignore[reportReturnType]
