"""Decides at plan time how a run quantizes."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from prunekit.checkpoint import adapter
from prunekit.checkpoint.compressed import KEPT_UNITS_KEY
from prunekit.checkpoint.packed import BITS, LIBRARY, library_is_installed
from prunekit.checkpoint.parts import is_whole
from prunekit.checkpoint.reader import Checkpoint
from prunekit.config.run_config import Config
from prunekit.errors import ConfigError
from prunekit.methods.quantize import Quantization
from prunekit.models.layout import Linear
from prunekit.models.weight_names import stored_names
from prunekit.runs.sparsify.source import Source
from prunekit.sparsify.recipe import Recipe

GROUPS = (128, 64, 32)
"""Inputs that share a scale of int4, most wanted first: the sizes that engines have kernels for."""


def planned_quantization(config: Config, source: Source) -> Quantization | None:
    """Return how a run quantizes, or None.

    All linears share one size of group, which engines and the file's config have a single entry
    for: the largest that divides the inputs of each. Where none does, a row has one scale.

    Raises:
        ConfigError: A linear cannot be stored so that engines open it.
    """
    scheme = config.output.quantize
    if scheme is None:
        return None
    if reason := _why_not_quantizable(source.checkpoint):
        raise ConfigError(f"output.quantize: {reason}")
    linears = [linear for block in source.blocks for linear in block.pruned]
    stored = stored_names(source.model, source.checkpoint)
    for linear in linears:
        if reason := _why_not_storable(source, linear, stored[f"{linear.name}.weight"]):
            raise ConfigError(
                f"output.quantize: {linear.name} {reason}, which {LIBRARY} does not store. Leave "
                "the key out."
            )
    group = None
    if scheme == "int4":
        group = next((g for g in GROUPS if not any(each.inputs % g for each in linears)), None)
    return Quantization(scheme, group, compensates=config.calibration is not None)


def _why_not_quantizable(checkpoint: Checkpoint) -> str | None:
    """Return why the model cannot be stored so, or None."""
    if KEPT_UNITS_KEY in checkpoint.config:
        return (
            f"{checkpoint.folder} keeps different numbers of heads or neurons per layer, which "
            f"only prunekit opens, and {LIBRARY} is opened without it. Prune units with uniform = "
            "true, then quantize."
        )
    if adapter.is_beside(checkpoint.folder):
        return (
            f"{checkpoint.folder} has an adapter beside its weights, which would be lost. Merge it "
            "into them (peft: merge_and_unload), then quantize."
        )
    return None


def _why_not_storable(source: Source, linear: Linear, stored: str) -> str | None:
    if linear.expert or not is_whole(stored):
        return "is an expert, or a part of a tensor"
    if not isinstance(source.model.get_submodule(linear.name), nn.Linear):
        return "stores its inputs first"
    return None


def quantization_notes(recipe: Recipe, source: Source) -> Iterator[str]:
    """Yield notes about scales, and about a library that is not installed."""
    quantization = recipe.quantize
    if quantization is None:
        return
    linears = [linear for block in source.blocks for linear in block.pruned]
    if quantization.scheme == "int4" and quantization.group is None:
        odd = next(each for each in linears if each.inputs % GROUPS[-1])
        yield (
            f"output.quantize: a row has one scale, which errs more than groups do: {odd.inputs} "
            f"inputs of {odd.name} are no groups of {', '.join(map(str, GROUPS))}."
        )
    if not library_is_installed():
        yield (
            f"{LIBRARY} is not installed here, so that the result is not opened with transformers "
            f"as a proof: pip install {LIBRARY}, then prunekit verify."
        )


def quantization_words(quantization: Quantization) -> str:
    """Return how plan and report name the scheme and its scales."""
    group = quantization.group
    scales = f"a scale for each {group} inputs" if group else "a scale for each output"
    how = "mask-aware GPTQ" if quantization.compensates else "rounded to nearest"
    return f"{quantization.scheme}, {scales}, {how}"


def quantized_bytes(
    dense: int,
    linears: Iterable[Linear],
    stored: Mapping[str, torch.dtype],
    quantization: Quantization,
) -> int:
    """Return the bytes of all tensors of the result.

    Args:
        dense: Bytes of all tensors before.
        linears: Those that are quantized.
        stored: Name of each → type of its scales, and of its weight before.
        quantization: How.
    """
    total = dense
    for linear in linears:
        width, bits = stored[linear.name].itemsize, BITS[quantization.scheme]
        words = -(-linear.inputs * bits // 32) * 4
        groups = linear.inputs // (quantization.group or linear.inputs)
        shape = 0 if quantization.scheme == "fp8" else 16
        total -= linear.size * width
        total += linear.outputs * (words + groups * width) + shape
    return total
