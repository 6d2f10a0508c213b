"""Scoring, pruning and removal of units of a model in memory.

    heads = prunekit.heads(model)
    heads.prune(heads.score("output-norm", tokens), 0.3)
    heads.finalize()

Until ``finalize`` the model's weights are unchanged, and ``undo`` reverts each step. Layers and
units are counted from 0; a layer is an index into ``heads.groups``.
"""

from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel
from typing_extensions import Unpack

from prunekit.errors import ConfigError
from prunekit.models.units.kinds import Kind
from prunekit.structured.batches import Batch, Data, predicted_labels, to_batches
from prunekit.structured.finalize import Finalized, finalize
from prunekit.structured.gate_set import attached_gates
from prunekit.structured.gradual_units import GradualUnits
from prunekit.structured.optimizers import Optimizers, check_replaceable, check_trains, retire
from prunekit.structured.rankers import Ranker
from prunekit.structured.scored_gates import ScoredGates
from prunekit.structured.selection import check_finite
from prunekit.structured.snapshot import all_or_nothing, namespaces_of
from prunekit.structured.unit_choice import ScheduleOptions, choice_of, schedule_of


class Gates(ScoredGates):
    """Gates on all units of one kind, with scoring and removal."""

    def during(
        self,
        optimizer: Optimizer,
        ranker: str | Ranker,
        data: Data | None = None,
        *,
        sparsity: float,
        end: int,
        **options: Unpack[ScheduleOptions],
    ) -> GradualUnits:
        """Close gates on a schedule while an optimizer trains the model.

        At each due step the units are scored anew with the current gates, and the lowest are
        closed, whose weights are then held as by :meth:`hold`. One ``undo`` reverts all steps.

        Args:
            optimizer: The optimizer whose steps count.
            ranker: A ranker, or its name.
            data: Token ids [N, T] or batches; None for a ranker of weights alone.
            sparsity: Fraction of all units that is pruned at the end.
            end: Last step at which units are pruned.
            options: See :class:`ScheduleOptions`.

        Returns:
            The pruner, in force until ``remove()`` or the end of a ``with`` block.

        Raises:
            ConfigError: A value is invalid, the count is impossible or no unit would be pruned, or
                more units are pruned already; the optimizer trains no parameter of the model, or
                these gates are pruned during a training already.
        """
        self._check_no_pruner("during")
        check_trains(optimizer, self.model, self._values)
        schedule = schedule_of(sparsity, end, options)
        chosen = self._ranker(ranker, dict(options.get("settings", {})))
        batches = self._batches_of(chosen, data, regrows=bool(options.get("regrow")))
        regrowth = options.get("regrow", 0.0), options.get("regrow_every")
        choice = choice_of(chosen, batches, options)
        self._pruner = GradualUnits(self, optimizer, schedule, choice, regrowth)
        self._remember()
        return self._pruner

    def _batches_of(self, ranker: Ranker, data: Data | None, *, regrows: bool) -> list[Batch]:
        """Return the batches that a ranker or a regrowth needs, checked."""
        batches = to_batches(data, self.model) if regrows or ranker.needs_data else []
        if regrows or any(each.needs_loss for each in ranker.components):
            for batch in batches:
                predicted_labels(self.model, batch)
        return batches

    def finalize(
        self,
        data: Data | None = None,
        *,
        stock: bool = False,
        optimizer: Optimizers = None,
    ) -> Finalized:
        """Remove pruned units from the matrices.

        The output is that of the gated model. Factors of kept units are folded into the weights.
        New gates, all at 1, are attached to the remaining units. If it fails, nothing is changed.
        Under DDP all processes call it, and then wrap the model again; the old wrapper says so.

        Args:
            data: Samples on which the reading linears are refitted, in run order, to their output
                with all units; the output is then closer to the dense model's.
            stock: Refuse, before any change, if a stock config cannot describe the new shapes.
            optimizer: Each optimizer that trains the model. It goes on with the smaller parameters
                in their groups; every tensor of its state is cut likewise, its steps are kept.

        Raises:
            ConfigError: There is data but no linear to refit, or a gate is not finite, or neither
                open nor closed where no weight can absorb its factor; an optimizer in use was not
                given or cannot follow; the model is sharded; ``during`` is in force.
            ShapeError: ``stock``, or the kind, needs a config that describes the new shapes, and
                there is none; the message names the constraint.
            CheckpointError: Blocks keep different heads, share a position bias, and this
                transformers computes their attention by itself.
        """
        self._check_no_pruner("finalize")
        for name, gate in self.gates.items():
            check_finite(f"{name}: gate", gate.factor)
        optimizers, wrappers = check_replaceable(self.model, self._values, optimizer)
        changed = [*namespaces_of(self.model), vars(self), *map(vars, self.gates.values())]
        for each in optimizers:
            changed += [vars(each), *each.param_groups]
        with all_or_nothing(changed):
            done = finalize(
                self.model, self.groups, self.gates, data, stock=stock, optimizers=optimizers
            )
            self._attach()
        retire(wrappers)
        return done

    @property
    def _values(self) -> list[Tensor]:
        return [gate.value for gate in self.gates.values()]

    def _check_no_pruner(self, doing: str) -> None:
        if self._pruner is not None and self._pruner.in_force:
            raise ConfigError(
                f"{doing}: these gates are pruned during a training. Call remove() of what during "
                "returned first, or leave its with block."
            )


def _gates(model: PreTrainedModel, kind: Kind) -> Gates:
    """Return the gates on one kind of units, attached or new."""
    attached = attached_gates(model, kind)
    return attached if isinstance(attached, Gates) else Gates(model, kind)


def heads(model: PreTrainedModel) -> Gates:
    """Return gates on the attention heads of a model.

    Under grouped queries a unit is a key head with all query heads that share it.

    Raises:
        ConfigError: It is no transformers model with its weights in memory.
        CheckpointError: The family is not declared.
    """
    return _gates(model, "heads")


def neurons(model: PreTrainedModel) -> Gates:
    """Return gates on the neurons of a model's feed-forwards.

    Raises:
        ConfigError: It is no transformers model with its weights in memory.
        CheckpointError: The family is not declared.
    """
    return _gates(model, "neurons")


def blocks(model: PreTrainedModel) -> Gates:
    """Return gates on whole blocks; a closed one passes its input through.

    Raises:
        ConfigError: It is no transformers model with its weights in memory.
        CheckpointError: The family is not declared and cannot be probed.
    """
    return _gates(model, "blocks")


def hidden(model: PreTrainedModel) -> Gates:
    """Return gates on the coordinates of a model's residual stream.

    Raises:
        ConfigError: It is no transformers model with its weights in memory.
        CheckpointError: The family is not declared and cannot be probed.
        ShapeError: Coordinates cannot be removed; the message names the constraint.
    """
    return _gates(model, "hidden")


def experts(model: PreTrainedModel) -> Gates:
    """Return gates on the experts of a model's mixtures.

    While an expert is closed its router chooses among the open ones, so that these take its tokens,
    exactly as after the removal. Layers keep equally many: prune with ``scope="layer"``.

    Raises:
        ConfigError: It is no transformers model with its weights in memory.
        CheckpointError: The family cannot be probed, or has no experts.
        ShapeError: Experts cannot be removed; the message names the constraint.
    """
    return _gates(model, "experts")
