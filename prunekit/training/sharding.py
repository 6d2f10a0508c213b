"""Trained weights, sharded over processes by FSDP 2.

Each rank has a part of every weight, with its gradient and its optimizer state; a block is whole
while it runs. If adapters are trained, the weights under them are sharded, and each rank has the
adapters, which are small and may grow.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.architectures import find_architecture
from prunekit.architectures.adapters import adapter_layers, bare_model
from prunekit.distributed.heartbeat import SUSPECT_SECONDS, with_hint
from prunekit.distributed.ranks import Ranks
from prunekit.errors import ConfigError, PrunekitError, RankError
from prunekit.models.in_memory import is_distributed, is_sharded, local_part, own_part
from prunekit.models.layout import stack_runners

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Tables of a module to which FSDP 2 adds hooks."""
FSDP = "torch.distributed.fsdp"
"""Package of these hooks."""


class Sharding:
    """A model whose weights are sharded, until they are gathered.

    All ranks have to run the model alike, as they exchange weights in each forward and backward.
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks) -> None:
        """Shard a model in place.

        Args:
            model: The model, the same on all ranks, possibly with gates or adapters.
            ranks: Several processes in one process group.

        Raises:
            ConfigError: There is one process, or the model is sharded already.
        """
        if not ranks.is_distributed:
            raise ConfigError(
                "sharded: one process has all weights. Start several, such as with torchrun "
                "--nproc-per-node 2, or leave it out."
            )
        if is_sharded(model):
            raise ConfigError("sharded: the model is sharded already; pass it whole.")
        self._model, self._ranks = bare_model(model), ranks
        self._before = [(each, type(each), {*vars(each)}) for each in self._model.modules()]
        _shard(self._model, ranks)
        self._added = [{*vars(each)} - names for each, _, names in self._before]

    @torch.no_grad()
    def gather(self) -> None:
        """Gather each weight in turn on the CPU of rank 0.

        The model is then as before it was sharded, with the weights of now. On other ranks its
        parameters are zeros.
        """
        from torch.distributed.fsdp import FSDPModule

        for module, _, _ in self._before:
            if isinstance(module, FSDPModule):
                module.reshard()
        wholes: dict[Tensor, nn.Parameter] = {}
        for name, part in [*self._model.named_parameters()]:
            if is_distributed(part):
                with self._ranks.collective(f"gather of {name}", part.numel() * part.itemsize):
                    value = part.full_tensor()
                value = value.cpu() if self._ranks.is_main else _zeros(value)
                wholes[part] = nn.Parameter(value, requires_grad=part.requires_grad)
        for (module, kind, _), added in zip(self._before, self._added, strict=True):
            _restore(module, kind, added, wholes)
        self._model.to("cpu")  # pyright: ignore


def _zeros(value: Tensor) -> Tensor:
    """Return zeros on the CPU in place of a tensor."""
    # They take no memory until they are written.
    return torch.zeros(value.shape, dtype=value.dtype)


def _shard(model: PreTrainedModel, ranks: Ranks) -> None:
    """Shard each block, and all that is outside of blocks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    trained = {each for each in model.parameters() if each.requires_grad}
    ignored = trained if adapter_layers(model) else set[nn.Parameter]()
    options: dict[str, Any] = {
        "mesh": init_device_mesh(model.device.type, (ranks.size,)),
        "ignored_params": ignored,
        # Also outside of blocks, so that the model has its parts after an evaluation.
        "reshard_after_forward": True,
    }
    for block in blocks_of(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The losses of ranks add up, so their gradients do; gloo knows no other reduction.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(enable=True)


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the blocks of a model, which may have adapters."""
    bare = bare_model(model)
    return [block for each in stack_runners(bare, find_architecture(bare)) for block in each.blocks]


def _restore(
    module: nn.Module,
    kind: type[nn.Module],
    added: set[str],
    wholes: Mapping[Tensor, nn.Parameter],
) -> None:
    """Register whole parameters, and remove all that sharding added to a module.

    Args:
        module: The module.
        kind: Its class before.
        added: Attributes that it did not have before.
        wholes: Whole parameter of each sharded one.
    """
    from torch.distributed._composable_state import _module_state_mapping

    for name, part in module._parameters.items():
        if part is not None:
            module._parameters[name] = wholes.get(part, part)
    for table in HOOKS:
        _remove_hooks(getattr(module, table))
    for name in added:
        vars(module).pop(name, None)
    _module_state_mapping.pop(module, None)  # so that it can be sharded again
    module.__class__ = kind


def _remove_hooks(hooks: dict[int, Any]) -> None:
    for number in [number for number, hook in hooks.items() if _is_of_fsdp(hook)]:
        del hooks[number]


def _is_of_fsdp(hook: Any) -> bool:  # noqa: ANN401  any callable
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith(FSDP)


@contextmanager
def sharded(
    model: PreTrainedModel, ranks: Ranks, second: PreTrainedModel | None = None
) -> Iterator[None]:
    """Shard a model within the context.

    At its end, also by an error that all ranks have, the weights are gathered.

    Args:
        model: The model.
        ranks: The processes that have the parts.
        second: Another model that is sharded too, and not gathered.
    """
    sharding = Sharding(model, ranks)
    if second is not None:
        Sharding(second, ranks)
    with _failures_named(ranks):
        try:
            yield
        except RankError:
            raise
        except (PrunekitError, GeneratorExit):
            sharding.gather()
            raise
        sharding.gather()


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Gather all weights in place; changes reach the parts afterwards."""
    from torch.distributed.fsdp import FSDPModule

    modules = [each for each in model.modules() if isinstance(each, FSDPModule)]
    if not modules:
        yield
        return
    for module in modules:
        module.reshard()  # an evaluation may have left it whole
    parts = {name: each for name, each in model.named_parameters() if is_distributed(each)}
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_without_hooks(cast("nn.Module", module)))
            module.unshard()
        yield
        with torch.no_grad():
            for name, whole in model.named_parameters():
                if name in parts:
                    local_part(parts[name]).copy_(own_part(whole, parts[name]))
        for module in modules:
            module.reshard()


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Remove the hooks of FSDP, which would shard the weights again."""
    tables: list[dict[int, Any]] = [getattr(module, table) for table in HOOKS]
    before = [{**hooks} for hooks in tables]
    for hooks in tables:
        _remove_hooks(hooks)
    try:
        yield
    finally:
        for hooks, known in zip(tables, before, strict=True):
            now = {**hooks}
            kept = {n: hook for n, hook in known.items() if n in now or _is_of_fsdp(hook)}
            hooks.clear()
            hooks.update(kept | now)


@contextmanager
def _failures_named(ranks: Ranks) -> Iterator[None]:
    """Name the rank that failed, if an exchange of weights fails.

    Raises:
        RankError: Another rank failed.
    """
    try:
        yield
    except RuntimeError as error:
        if ranks.heartbeat is None:
            raise
        ranks.heartbeat.failed_rank()  # waits until it is known
        if failure := ranks.heartbeat.failure(SUSPECT_SECONDS):
            raise RankError(with_hint(failure)) from error
        raise
