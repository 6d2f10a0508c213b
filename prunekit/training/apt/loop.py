"""The training of APT, from adding adapters to merging them.

Source: Zhao et al., APT: Adaptive Pruning and Tuning Pretrained Language Models, arXiv:2401.12200,
and its code, github.com/ROIM1998/APT.

Shapes: N samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from prunekit.architectures.adapters import base_layer
from prunekit.architectures.coverage import LINEAR_TYPES
from prunekit.config.apt_table import Apt
from prunekit.config.distill_table import Distill
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.structured.batches import Data, is_causal
from prunekit.structured.unit_gates import heads, hidden, neurons
from prunekit.training.apt.growth import initialize, set_scale
from prunekit.training.apt.pruner import AptPruner
from prunekit.training.lora import add_adapter, merge_adapters
from prunekit.training.recover import TrainingStep, recover
from prunekit.training.teachers import SharedTeacher

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.optim import Optimizer

GATES = {"hidden": hidden, "heads": heads, "neurons": neurons}


def apt(
    model: PreTrainedModel,
    data: Data,
    held_out: Data,
    settings: Apt,
    *,
    distill: Distill | None = None,
    ranks: Ranks = SINGLE,
) -> Generator[TrainingStep, None, AptPruner]:
    """Train adapters that prune a model and grow; then merge them.

    The model is changed in place: afterwards it has fewer heads, neurons and coordinates, and no
    adapters or gates. Dropout is off. The best adapters after the last window are kept.

    Args:
        model: A transformers model with all weights in memory, in float32.
        data: Token ids [N, T], or batches with the inputs of the loss.
        held_out: Likewise; the best adapters have the lowest loss on it.
        settings: The table ``[apt]``.
        distill: The table ``[distill]``. The teacher is the model itself with open gates and the
            best adapters so far, so matrices are cut after the last step only. μ rises until the
            last window ends, if the table does not say otherwise.
        ranks: Processes with the same model and data; each runs its share of every batch.

    Returns:
        The pruner, with the kept units of each group.

    Raises:
        ConfigError: peft is not installed, the budget cannot be met, or a target is no linear.
        ShapeError: Coordinates of this family cannot be removed.
        NumericsError: The loss or a salience is not finite.
    """
    gates = [GATES[kind](model) for kind in GATES if kind in settings.kinds]
    adapted = _with_adapters(model, settings)
    used: list[AptPruner] = []

    @contextmanager
    def during(optimizer: Optimizer) -> Iterator[AptPruner]:
        with AptPruner(model, gates, optimizer, settings, ranks, cuts=distill is None) as pruner:
            used.append(pruner)
            yield pruner

    train = partial(recover, model, data, held_out, settings, ranks=ranks, during=during)
    if distill is None:
        yield from train()
    else:
        ends = distill.model_copy(update={"end": distill.end or settings.end})
        yield from train(distill=ends, teacher=SharedTeacher(model, gates))
    _finish(used[0], adapted)
    return used[0]


def _with_adapters(model: PreTrainedModel, settings: Apt) -> PeftModel:
    """Add the adapters; return the model of peft."""
    targets = settings.targets or default_targets(model)
    adapted = add_adapter(model, settings.rank, targets, seed=settings.seed)
    set_scale(model, settings.scale)
    initialize(model, settings.seed)
    for parameter in also_trained(model, settings.also):
        parameter.requires_grad_()
    return adapted


def _finish(pruner: AptPruner, adapted: PeftModel) -> None:
    """Remove closed units, merge the adapters and remove the gates."""
    if any(each.closed for each in pruner.gates):
        pruner.cut()
    merge_adapters(adapted)
    for each in pruner.gates:
        each.detach()


def default_targets(model: PreTrainedModel) -> list[str]:
    """Return the roles that the authors adapt in models of this kind."""
    encodes = model.config.is_encoder_decoder or not is_causal(model)
    return ["query", "value", *(["up"] if encodes else [])]


def also_trained(model: PreTrainedModel, also: Sequence[str]) -> list[nn.Parameter]:
    """Return the parameters that are trained beside the adapters.

    Args:
        model: The model with its adapters.
        also: "norms", "biases" and "head" (all outside of the base model but output embeddings).
    """
    found: dict[nn.Parameter, None] = {}
    outside = {*model.modules()} - {*model.base_model.modules(), model.get_output_embeddings()}
    for module in model.modules():
        is_linear = isinstance(base_layer(module), LINEAR_TYPES)
        is_norm = not is_linear and not isinstance(module, nn.Embedding)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            wanted = (
                ("norms" in also and is_norm and parameter.ndim == 1)
                or ("biases" in also and name == "bias")
                or ("head" in also and module in outside)
            )
            if wanted:
                found[parameter] = None
    return [*found]
