"""The training of APT, from adding adapters to merging them.

Source: Zhao et al., APT: Adaptive Pruning and Tuning Pretrained Language Models, arXiv:2401.12200,
and its code, github.com/ROIM1998/APT.

Shapes: N samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from prunekit.architectures.adapters import adapter_layers
from prunekit.config.apt_table import Apt
from prunekit.config.distill_table import Distill
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.models.units.kinds import Kind
from prunekit.structured.batches import Data, is_causal
from prunekit.structured.gate_set import attached_gates
from prunekit.structured.unit_gates import Gates, heads, hidden, neurons
from prunekit.training.apt.growth import adapter_parameters, initialize, set_scale
from prunekit.training.apt.pruner import AptPruner
from prunekit.training.chosen_parameters import chosen_parameters
from prunekit.training.lora import add_adapter, merge_adapters, relocate_gates
from prunekit.training.recover import TrainingStep, recover
from prunekit.training.saved_state import TrainingLog
from prunekit.training.teachers import SharedTeacher

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.optim import Optimizer

GATES: dict[Kind, Callable[[PreTrainedModel], Gates]] = {
    "hidden": hidden,
    "heads": heads,
    "neurons": neurons,
}


def apt(  # noqa: PLR0913  independent options
    model: PreTrainedModel,
    data: Data,
    held_out: Data,
    settings: Apt,
    *,
    distill: Distill | None = None,
    ranks: Ranks = SINGLE,
    log: TrainingLog | None = None,
) -> Generator[TrainingStep, None, AptPruner]:
    """Train adapters that prune a model and grow; then merge them.

    The model is changed in place: afterwards it has fewer heads, neurons and coordinates, and no
    adapters or gates. Dropout is off. The best adapters after the last window are kept.

    If it ends early, by an error or as the generator is closed, the model is as trained so far:
    without the units of the windows that ended, with the adapters of the last step that was done
    merged (left out, if they are not finite), without gates. Before the first step it is as it was.

    Args:
        model: A transformers model with all weights in memory, in float32.
        data: Token ids [N, T], or batches with the inputs of the loss.
        held_out: Likewise; the best adapters have the lowest loss on it.
        settings: The table ``[apt]``.
        distill: The table ``[distill]``. The teacher is the model itself with open gates and the
            best adapters so far, so matrices are cut after the last step only, as sharded ones are.
            μ rises until the last window ends, if the table does not say otherwise.
        ranks: Processes with the same model and data; each runs its share of every batch.
        log: See :func:`prunekit.training.recover.recover`.

    Returns:
        The pruner, with the kept units of each group.

    Raises:
        ConfigError: peft is not installed, the budget cannot be met, or a target is no linear.
        ShapeError: Coordinates of this family cannot be removed.
        NumericsError: The loss or a salience is not finite.
    """
    with _adapted(model, settings) as adapted:
        state = log.state["pruning"] if log and log.state else None
        cuts = distill is None and not settings.sharded
        during = partial(adapted.pruned, settings, ranks, state, cuts=cuts)
        options: dict[str, Any] = {"ranks": ranks, "during": during, "log": log}
        if distill is not None:
            options["distill"] = distill.model_copy(update={"end": distill.end or settings.end})
            options["teacher"] = SharedTeacher(model, adapted.gates)
        yield from recover(model, data, held_out, settings, **options)
    assert adapted.pruner is not None
    return adapted.pruner


@dataclass
class Adapted:
    """A model with gates and adapters.

    Attributes:
        model: The model.
        gates: Its gates of each kind.
        peft: The model of peft.
        pruner: The pruner, once the training has begun.
    """

    model: PreTrainedModel
    gates: Sequence[Gates]
    peft: PeftModel
    pruner: AptPruner | None = None

    @contextmanager
    def pruned(
        self,
        settings: Apt,
        ranks: Ranks,
        state: Mapping[str, Any] | None,
        optimizer: Optimizer,
        *,
        cuts: bool,
    ) -> Iterator[AptPruner]:
        """Prune the model within the context.

        Args:
            settings: The windows and the budget.
            ranks: Processes that share every batch.
            state: State of a pruner whose shapes the model gets; None to begin.
            optimizer: The optimizer that trains the adapters.
            cuts: See :class:`AptPruner`.
        """
        with AptPruner(self.model, self.gates, optimizer, settings, ranks, cuts=cuts) as pruner:
            self.pruner = pruner
            if state:
                pruner.rebuild(state)
            yield pruner

    def finish(self) -> None:
        """Remove closed units and gates, and merge the adapters."""
        if self.pruner is None or not self.pruner.step:
            return
        self.pruner.open_left()
        if any(each.closed for each in self.gates):
            self.pruner.cut()
        pairs = adapter_parameters(self.peft).values()
        if all(bool(each.isfinite().all()) for pair in pairs for each in pair):
            merge_adapters(self.peft)
        for each in self.gates:
            each.detach()

    def unload(self) -> None:
        """Remove adapters that were not merged."""
        if adapter_layers(self.peft):
            relocate_gates(self.peft.unload())


@contextmanager
def _adapted(model: PreTrainedModel, settings: Apt) -> Iterator[Adapted]:
    """Add gates and adapters for the time of a context."""
    with ExitStack() as stack:
        gates = []
        kinds: list[Kind] = [kind for kind in GATES if kind in settings.kinds]
        for kind in kinds:
            attached = attached_gates(model, kind)
            gates.append(GATES[kind](model))
            if not attached:
                stack.callback(gates[-1].detach)
        frozen = {name for name, each in model.named_parameters() if not each.requires_grad}
        targets = settings.targets or default_targets(model)
        peft = add_adapter(model, settings.rank, targets, seed=settings.seed)
        stack.callback(_unfreeze, model, frozen)
        adapted = Adapted(model, gates, peft)
        stack.callback(adapted.unload)
        set_scale(model, settings.scale)
        initialize(model, settings.seed)
        for parameter in chosen_parameters(model, settings.also):
            parameter.requires_grad_()
        stack.callback(adapted.finish)
        yield adapted


def _unfreeze(model: PreTrainedModel, frozen: Container[str]) -> None:
    """Let all parameters but some require a gradient again."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def default_targets(model: PreTrainedModel) -> list[str]:
    """Return the roles that the authors adapt in models of this kind."""
    encodes = model.config.is_encoder_decoder or not is_causal(model)
    return ["query", "value", *(["up"] if encodes else [])]
