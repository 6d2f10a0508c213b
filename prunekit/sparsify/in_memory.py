"""Prune a model that is already in memory.

Shapes: N samples, T tokens.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

from jaxtyping import Bool
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.architectures import find_architecture
from prunekit.architectures.adapters import adapter_layers, bare_model
from prunekit.config.messages import explain
from prunekit.config.prune_table import DEFAULT_METHOD, Prune
from prunekit.errors import ConfigError
from prunekit.methods import Method, methods
from prunekit.models.adapters import all_masked
from prunekit.models.experts import unfused
from prunekit.models.in_memory import check_in_memory
from prunekit.models.layout import (
    Block,
    Linear,
    LinearSelection,
    list_blocks,
    stack_runners,
)
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.models.sequential.pipeline import OutputsRead, iterate_blocks, load_blocks
from prunekit.sparsify.block_pruner import BlockPruner
from prunekit.sparsify.calibrate import make_survey
from prunekit.sparsify.layer_result import LayerResult, PrunedLinear
from prunekit.sparsify.permute_channels import channel_orders, check_permutable, permute_channels
from prunekit.sparsify.permute_residual import permute_residual, residual_axes, residual_order
from prunekit.sparsify.recipe import Recipe
from prunekit.structured.batches import Batch, Data, eval_mode
from prunekit.structured.block_batches import block_batches


def prune(
    model: PreTrainedModel,
    tokens: Data | None = None,
    *,
    method: str = DEFAULT_METHOD,
    pattern: str = "unstructured",
    **settings: Any,  # noqa: ANN401  the keys of [prune]
) -> list[PrunedLinear]:
    """Prune a model in place, block by block; return measurements.

    Args:
        model: A transformers model on one device. With adapters of peft it is the sum of weight
            and adapter that is pruned; see ``prunekit.training.mask_adapters``.
        tokens: Calibration samples [N, T], or batches with masks, whose padding is left out; None
            for a method that needs weights alone.
        method: Its name; see ``prunekit list``.
        pattern: "unstructured", "2:4", "block:16x16", "row", "column".
        settings: Other keys of ``[prune]`` and of the method, such as ``sparsity=0.5``.

    Returns:
        A record of each linear: name, shape, sparsity, relative_error, seconds.

    Raises:
        ConfigError: A setting is invalid, or needs calibration tokens that were not passed.
        PrunekitError: The model cannot be pruned so; see each kind of error.
    """
    check_in_memory(model)
    model = bare_model(model)
    section = prune_table({"method": method, "pattern": pattern, **settings})
    batches = None if tokens is None else block_batches(tokens, model)
    recipe = Recipe.of(section, calibrated=batches is not None)
    _check_adapters(model, section)
    if batches is None and (user := section.calibration_user):
        raise ConfigError(f"{user}: needs calibration tokens; pass tokens=[N, T] or batches.")
    if section.recover == "lowrank":
        raise ConfigError(
            "recover lowrank: writes an adapter beside a checkpoint, so it needs a run: "
            "prunekit.run(prunekit.plan(config))."
        )
    with unfused(model):
        pruner = ModelPruner.of(model, batches, section, recipe)
        results = pruner.prune(pruner.allocate(section.sparsity))
        return [cast("PrunedLinear", result.arrived().as_record()) for result in results]


def _check_adapters(model: PreTrainedModel, section: Prune) -> None:
    """Refuse adapters that would not see the zeros.

    Raises:
        ConfigError: An active adapter is not masked, or channels of adapted linears were permuted.
    """
    for path, layer in adapter_layers(model).items():
        if not all_masked(layer):
            raise ConfigError(
                f"model: the adapter of {path} is not masked, so it would fill the zeros again. "
                "Call prunekit.training.mask_adapters(model) first, or merge the adapter."
            )
        if section.permute or section.recover == "block":
            key = "permute" if section.permute else 'recover = "block"'
            raise ConfigError(f"{key}: does not apply to a model with adapters. Merge them first.")


@dataclass(frozen=True)
class ModelPruner:
    """Prunes the blocks of a model in memory, whose experts are linears.

    Attributes:
        model: The model, changed in place.
        batches: Calibration samples, as :func:`block_batches` returns them; None for settings that
            need weights alone.
        section: The table ``[prune]``.
        recipe: The settings of the blocks.
        stacks: The model's stacks.
        blocks: Its blocks with their linears.
    """

    model: PreTrainedModel
    batches: Sequence[Batch] | None
    section: Prune
    recipe: Recipe
    stacks: Sequence[StackRunner]
    blocks: Sequence[Block]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        batches: Sequence[Batch] | None,
        section: Prune,
        recipe: Recipe,
    ) -> Self:
        """Find the blocks and check that they can be pruned so.

        Args:
            model: The model.
            batches: Calibration samples, if any.
            section: The table ``[prune]``.
            recipe: The settings of the blocks.

        Raises:
            PrunekitError: A setting does not fit the model.
        """
        stacks = stack_runners(model, find_architecture(model))
        if recipe.permute:
            check_permutable(model, stacks)
        selection = LinearSelection(section.pattern, section.skip, section.on_indivisible)
        blocks = list_blocks(stacks, selection)
        recipe.check(blocks)
        return cls(model, batches, section, recipe, stacks, blocks)

    @property
    def linears(self) -> list[Linear]:
        """The linears that are pruned."""
        return [linear for block in self.blocks for linear in block.pruned]

    def allocate(self, sparsity: float) -> dict[str, float]:
        """Return the sparsity of each linear by name."""
        allocation, pattern = self.section.allocation, self.section.pattern
        outputs_read: OutputsRead = "all" if allocation.needs else "none"
        with self._running(outputs_read):
            return allocation.allocate(
                {linear.name: linear.size for linear in self.linears},
                make_survey(lambda: self._iterate(outputs_read), allocation, pattern),
                sparsity,
            )

    def prune(
        self,
        sparsities: Mapping[str, float],
        kept: MutableMapping[str, Bool[Tensor, "O I"]] | None = None,
    ) -> Iterator[LayerResult]:
        """Prune the model, and yield the result of each linear.

        Args:
            sparsities: Sparsity of each linear by name.
            kept: See :class:`prunekit.sparsify.block_pruner.BlockPruner`.
        """
        model, recipe = self.model, self.recipe
        weights = {each.name: model.get_parameter(f"{each.name}.weight") for each in self.linears}
        dtypes = {name: weight.dtype for name, weight in weights.items()}
        axes = residual_axes(model) if recipe.permute == "residual" else {}
        with self._running("all" if axes else recipe.outputs_read):
            if axes and (order := residual_order(self._iterate("all"), self.blocks, axes, recipe)):
                permute_residual(model, axes, order)
            pruner = BlockPruner(recipe, sparsities, dtypes, kept)
            for loaded, block in self._iterate(
                recipe.outputs_read, with_dense=recipe.runs_dense_model
            ):
                permute_channels(loaded, channel_orders(loaded, block, recipe))
                yield from pruner.prune(loaded, block)
                loaded.checks.settle()

    @contextmanager
    def _running(self, outputs_read: OutputsRead) -> Iterator[None]:
        """Prepare the model for running its blocks, if they run."""
        with ExitStack() as stack:
            if outputs_read != "none":
                stack.enter_context(eval_mode(self.model))
                stack.enter_context(uncached(self.model, self.stacks))
            yield

    def _iterate(
        self, outputs_read: OutputsRead, *, with_dense: bool = False
    ) -> Iterator[tuple[LoadedBlock, Block]]:
        if outputs_read == "none":
            loaded = load_blocks(self.stacks, None, range(len(self.blocks)))
        else:
            assert self.batches is not None
            loaded = iterate_blocks(
                self.model,
                self.stacks,
                None,
                self.batches,
                with_dense=with_dense,
                outputs_read=outputs_read,
            )
        return zip(loaded, self.blocks, strict=True)


@contextmanager
def uncached(model: PreTrainedModel, stacks: Sequence[StackRunner]) -> Iterator[None]:
    """Turn off key-value caches for the time of a ``with`` block."""
    configs = [model.config, *(runner.module.config for runner in stacks)]
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


def prune_table(values: dict[str, Any]) -> Prune:
    """Return the table ``[prune]`` of keyword arguments.

    Raises:
        ConfigError: A key or a value is invalid; all are named.
    """
    try:
        return Prune.model_validate(values)
    except ValidationError as error:
        chosen = methods().get(str(values.get("method", DEFAULT_METHOD)), Method)
        fields = {**Prune.model_fields, **chosen.model_fields}
        lines = []
        for details in error.errors():
            key = next(part for part in reversed(details["loc"]) if isinstance(part, str))
            lines.append(f"{key}: {explain(details, key, fields)}")
        raise ConfigError("\n".join(lines)) from None
