"""Gradual pruning of single weights while a model is trained.

    pruner = prunekit.GradualPruner(model, optimizer, sparsity=0.8, start=100, end=1000, every=100)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

Shapes: N samples, T tokens, O output features, I input features.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from prunekit.allocations.uniform import Uniform
from prunekit.errors import ConfigError
from prunekit.models.experts import unfused
from prunekit.models.in_memory import whole_tensor
from prunekit.sparsify.in_memory import ModelPruner
from prunekit.sparsify.kept_pattern import KeptPattern
from prunekit.sparsify.recipe import Recipe
from prunekit.structured.batches import Data
from prunekit.structured.block_batches import block_batches
from prunekit.structured.scheduled import ScheduledPruner
from prunekit.training.gradual_settings import (
    gradual_schedule,
    gradual_section,
    unwrapped_model,
    zeros_message,
    zeros_of,
)
from prunekit.training.masked_adapters import mask_all_adapters
from prunekit.training.masks import Masks
from prunekit.training.regrowth import Regrowth, regrown
from prunekit.training.sharding import whole_weights
from prunekit.training.weight_views import check_unmasked, find_weights


class GradualPruner(ScheduledPruner):
    """Prunes weights of a model while an optimizer trains it.

    At each due step the method prunes the weights to the sparsity of the schedule, with statistics
    gathered anew; in between, pruned weights remain zero: gradients, weights and the optimizer's
    state are masked. No pruned weight returns, except by ``regrow``: then those with the largest
    gradient (Evci et al., arXiv:1911.11134) return at zero, and as many with the smallest magnitude
    are pruned. Weights that are zero before count as pruned.

    Args:
        model: A transformers model on one device, or a wrapper of DDP, Accelerate or compile. It
            may be sharded by FSDP 2; then each process has it whole while it is pruned.
        optimizer: The optimizer whose steps count.
        end: Last step at which the model is pruned; then it has the sparsity.
        method: Name of the method; see ``prunekit list``.
        pattern: Which weights may be zero, such as "unstructured" or "2:4".
        sparsity: Fraction of zeros at the end; an n:m pattern fixes it.
        schedule: one-shot, linear or cubic; by default cubic, of n:m one-shot.
        start: First step at which the model is pruned; 0 is before the first forward.
        every: Steps between two prunings.
        initial: Sparsity at ``start``.
        tokens: Calibration samples [N, T] or batches, for methods that need statistics.
        regrow: Fraction of the pruned weights of each layer that returns at a regrowth.
        regrow_every: Steps between two regrowths.
        settings: Other keys of ``[prune]`` and of the method.

    Raises:
        ConfigError: A setting is invalid or needs tokens, the model is sharded, or its weights
            have masks already.

    Attributes:
        masks: The masks in force.
        sparsities: Sparsity of each linear at the last pruning, by name.
    """

    def __init__(  # noqa: PLR0913  independent options
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        end: int,
        method: str = "magnitude",
        pattern: str = "unstructured",
        sparsity: float | None = None,
        schedule: str | None = None,
        start: int = 0,
        every: int = 1,
        initial: float = 0.0,
        tokens: Data | None = None,
        regrow: float = 0.0,
        regrow_every: int | None = None,
        **settings: Any,  # noqa: ANN401  the keys of [prune]
    ) -> None:
        self.model = unwrapped_model(model)
        self.section = gradual_section(method, pattern, sparsity, settings)
        self.batches = None if tokens is None else block_batches(tokens, self.model)
        if self.batches is None and (user := self.section.calibration_user):
            raise ConfigError(f"{user}: needs calibration tokens; pass tokens=[N, T] or batches.")
        steps = {"start": start, "end": end, "every": every, "initial": initial}
        planned = gradual_schedule(self.section, schedule, steps)
        self._shares: dict[str, float] = {}
        self.sparsities: dict[str, float] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        recipe = replace(Recipe.of(self.section, calibrated=False), yields_results=False)
        with unfused(self.model):
            self._model_pruner = ModelPruner.of(self.model, self.batches, self.section, recipe)
        linears = self._model_pruner.linears
        self._views, places = find_weights(self.model, linears)
        check_unmasked(places)
        if regrow and not any(place.parameter.requires_grad for place in places.values()):
            raise ConfigError("regrow: needs gradients of the weights, which are all frozen.")
        with ExitStack() as stack:
            super().__init__(model, optimizer, planned, regrow, regrow_every)
            # Their hook runs after that of the schedule, and applies the masks that it sets.
            stack.callback(super().remove)
            self.masks = Masks(places, self.optimizer, mask_all_adapters(self.model))
            stack.pop_all()
        self.masks.dense_gradients = self._regrows_at(1)

    @override
    def remove(self) -> None:
        super().remove()
        self.masks.remove()

    @property
    @override
    def achieved(self) -> float:
        return self.masks.sparsity

    @property
    @override
    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters that are pruned, by name."""
        return self.masks.weights

    @override
    def _is_exact(self) -> bool:
        with self._pruner() as pruner:
            for linear in pruner.linears:
                view, sparsity = self._views[linear.name], self.sparsities.get(linear.name, 0.0)
                zeros = view.matrix.detach()[~view.keep(self.masks)] == 0
                wanted = zeros_of(self.section.pattern, linear, sparsity)
                if len(zeros) != wanted or not bool(zeros.all()):
                    return False
        return True

    @override
    def begin(self) -> None:
        """Begin, and prune if that is due at step 0.

        Raises:
            ConfigError: More weights are zero than at the end, and none returns: in all layers
                together, or in one if all have the same sparsity.
        """
        if not self._started:
            with self._pruner() as pruner:
                self._check_zeros(pruner, self.schedule.final)
            super().begin()
            if self.schedule.is_due(self.step):
                self.masks.apply(self.optimizer)

    def _check_zeros(self, pruner: ModelPruner, sparsity: float) -> None:
        pattern, total, most = self.section.pattern, 0, 0
        for linear in pruner.linears:
            nonzero = self._views[linear.name].matrix.detach() != 0
            wanted = zeros_of(pattern, linear, sparsity)
            zeros = linear.size - int(nonzero.sum())
            if isinstance(self.section.allocation, Uniform):
                keep = KeptPattern(pattern, nonzero).keep(nonzero.float(), sparsity)
                if int((~keep).sum()) > wanted:
                    raise ConfigError(zeros_message(linear.name, sparsity, zeros / linear.size))
            total, most = total + zeros, most + wanted
        if total > most:
            size = sum(linear.size for linear in pruner.linears)
            raise ConfigError(zeros_message("the model", sparsity, total / size))

    @override
    def _prune(self, sparsity: float) -> None:
        with self._pruner() as pruner:
            kept = {each.name: self._views[each.name].keep(self.masks) for each in pruner.linears}
            self.sparsities = self._sparsities(pruner, sparsity)
            for _ in pruner.prune(self.sparsities, kept):
                pass
            for name, keep in kept.items():
                self._views[name].set_keep(self.masks, keep)

    def _sparsities(self, pruner: ModelPruner, sparsity: float) -> dict[str, float]:
        """Return the sparsity of each linear at this step.

        An allocation by weights alone divides the sparsity of each step anew. One by statistics
        divides that of the last step, once; each linear then has a schedule of its own.
        """
        if not pruner.section.allocation.needs:
            return pruner.allocate(sparsity)
        self._shares = self._shares or pruner.allocate(self.schedule.final)
        initial = self.schedule.initial
        return {
            name: replace(self.schedule, final=final, initial=min(initial, final)).sparsity(
                self.step
            )
            for name, final in self._shares.items()
        }

    @override
    def _before_step(self) -> None:
        super()._before_step()
        self._gradients = {}
        if self.masks.dense_gradients:
            self._gradients = self.masks.take_gradients()

    @override
    def _after_step(self) -> None:
        super()._after_step()
        self.masks.dense_gradients = self._regrows_at(self.step + 1)

    @override
    def _regrow(self) -> None:
        with self._pruner() as pruner:
            for linear in pruner.linears:
                view, sparsity = self._views[linear.name], self.sparsities.get(linear.name, 0.0)
                gradient = self._gradients.get(view.parameter)
                if gradient is None or not sparsity:
                    continue
                gradient = view.of(whole_tensor(gradient))
                keep = regrown(
                    self.section.pattern.at(sparsity),
                    sparsity,
                    Regrowth(view.matrix, gradient, view.keep(self.masks), self.regrow),
                )
                view.set_keep(self.masks, keep)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return numbers, and the packed masks by name of the weight."""
        mine = {"shares": self._shares, "last": self.sparsities, "bits": self.masks.packed()}
        return super().state_dict() | mine

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, with the weights of the same step.

        Raises:
            ConfigError: It is of other settings or another model, or a weight that is pruned in it
                is not zero here. Nothing is changed then.
        """
        self.masks.check_packed(state["bits"])
        super().load_state_dict(state)
        self.masks.load_packed(state["bits"])
        self._shares, self.sparsities = dict(state["shares"]), dict(state["last"])
        self.masks.dense_gradients = self._regrows_at(self.step + 1)

    @override
    def _settings(self) -> dict[str, Any]:
        return super()._settings() | self.section.model_dump(mode="json")

    @contextmanager
    def _pruner(self) -> Iterator[ModelPruner]:
        """Return the pruner of the model; within the context experts are linears."""
        with ExitStack() as stack:
            stack.enter_context(whole_weights(self.model))
            stack.enter_context(unfused(self.model))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(self.model.device.type, enabled=False))
            if any(module._compiled_call_impl for module in self.model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield self._model_pruner
