"""Which linears of a model an adapter is added to."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from prunekit.architectures import FeedForward, Stack, find_architecture
from prunekit.architectures.coverage import LINEAR_TYPES, has_module
from prunekit.architectures.empty_linear import EmptyLinear
from prunekit.errors import CheckpointError, ConfigError
from prunekit.inference.sparse_linear import SparseLinear
from prunekit.models.orientation import features
from prunekit.models.units.emptied import is_empty

ALL_LINEAR = "all-linear"
"""All linears but the output embeddings, as peft has it."""

HEAD_ROLES = ("query", "key", "value", "output")
"""Linears of attentions, as attributes of their declaration."""
NEURON_ROLES = ("gate", "up", "down")
"""Linears of feed-forwards."""


def adapter_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> str | list[str]:
    """Return names of linears, as ``target_modules`` of peft takes them.

    Args:
        model: The model.
        targets: "all-linear", names of linears, or roles: query, key, value, output, gate, up,
            down. A role is used for a name where the family has it.

    Raises:
        ConfigError: One of them is no linear of the model, or there is none.
    """
    asked = [targets] if isinstance(targets, str) else [*targets]
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (*LINEAR_TYPES, SparseLinear))
    ]
    has_empty = any(isinstance(module, EmptyLinear) for module in model.modules())
    if asked == [ALL_LINEAR]:
        # peft itself knows no SparseLinear.
        sparse = any(isinstance(module, SparseLinear) for module in model.modules())
        head = model.get_output_embeddings()
        return (
            [name for name in names if model.get_submodule(name) is not head]
            if sparse or has_empty
            else ALL_LINEAR
        )
    roles = linears_by_role(model) if {*asked} & {*HEAD_ROLES, *NEURON_ROLES} else {}
    found: dict[str, None] = {}
    for target in asked:
        chosen = roles.get(target, [target])
        for path in chosen:
            if not any(name == path or name.endswith(f".{path}") for name in names):
                raise ConfigError(_message(model, target, [*roles], names))
        found |= dict.fromkeys(chosen)
    if not found:
        raise ConfigError(f'adapter: targets is empty. Choose "{ALL_LINEAR}", or names of linears.')
    if has_empty:  # which a name without a block may mean too
        ends = tuple(f".{path}" for path in found)
        return [name for name in names if f".{name}".endswith(ends)]
    return [*found]


def linears_by_role(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return the linears of each role, by their path in a block.

    A linear that computes several roles is in each of them. Empty for a family that is not declared
    and cannot be probed.
    """
    try:
        stacks = find_architecture(model).stacks
    except CheckpointError:
        return {}
    roles: dict[str, dict[str, None]] = {}
    for stack in stacks:
        for attention in stack.attentions:
            for role in HEAD_ROLES:
                roles.setdefault(role, {})[getattr(attention, role)] = None
        for role, path in _neuron_roles(model, stack):
            roles.setdefault(role, {})[path] = None
    return {role: [*paths] for role, paths in roles.items()}


def _neuron_roles(model: PreTrainedModel, stack: Stack) -> list[tuple[str, str]]:
    """Return the role and path of each linear of the feed-forwards."""
    (*blocks,) = model.base_model.get_submodule(stack.blocks).children()
    found = []
    for declared in stack.feed_forwards:
        block = next((each for each in blocks if _has_neurons(each, declared)), None)
        if block is None:
            continue
        found.append(("down", declared.output))
        inputs = [path for path in declared.inputs if has_module(block, path)]
        neurons = features(block.get_submodule(declared.output))[1]
        fused = features(block.get_submodule(inputs[0]))[0] > neurons
        # Gate and up in this order, or one linear that computes both, or no gate.
        gated = fused or len(inputs) > 1
        found += [("up", inputs[-1])] + ([("gate", inputs[0])] if gated else [])
    return found


def _has_neurons(block: nn.Module, declared: FeedForward) -> bool:
    return has_module(block, declared.output) and not is_empty(block, declared)


def _message(
    model: PreTrainedModel, target: str, roles: Sequence[str], names: Sequence[str]
) -> str:
    linears = sorted({name.rpartition(".")[2] for name in names})
    of_roles = f" Roles of this family: {', '.join(roles)}." if roles else ""
    return (
        f"adapter: targets: {target!r} is no linear of {type(model).__name__}. Choose "
        f'"{ALL_LINEAR}", or from {", ".join(linears)}.{of_roles}'
    )
