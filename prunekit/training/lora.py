"""LoRA adapters of peft on pruned weights: add, train, merge.

Shapes: O output features, I input features, R rank of an adapter.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.architectures.adapters import adapter_layers, bare_model, base_layer
from prunekit.errors import ConfigError
from prunekit.inference.sparse_linear import SparseLinear
from prunekit.models.causal import predicts_next_token
from prunekit.models.in_memory import check_in_memory
from prunekit.models.orientation import outputs_first, stored_transposed, weight_matrix
from prunekit.models.units.kinds import KINDS
from prunekit.structured.gate_set import attached_gates
from prunekit.training.adapter_targets import ALL_LINEAR, adapter_targets
from prunekit.training.masked_adapters import masked_layers

if TYPE_CHECKING:
    from peft import PeftModel


def add_adapter(
    model: PreTrainedModel,
    rank: int,
    targets: str | Sequence[str] = ALL_LINEAR,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> PeftModel:
    """Add a LoRA adapter to a model; only it is trained.

    The output is unchanged until the adapter is trained, as its second factor is zero. Its
    parameters are float32. Gates that the model has act on the adapter too.

    Args:
        model: A transformers model; its linears may be :class:`prunekit.SparseLinear`.
        rank: Rank of the adapter of each linear.
        targets: "all-linear", names of linears as peft takes them, or "query", "key", "value",
            "output", "gate", "up" and "down", which stand for the linears of a family. Where one
            linear computes several of these, it is adapted as a whole.
        alpha: The product of the factors is multiplied by alpha / rank; by default 2 · rank.
        dropout: Probability with which inputs of the adapter are dropped while training.
        seed: Seed of the first factor.

    Returns:
        The model of peft with the one adapter "default".

    Raises:
        ConfigError: peft is not installed, a number is out of range, a target is no linear of this
            model, or the model has adapters already.
    """
    check_in_memory(model)
    _check_numbers(rank, alpha, dropout)
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("adapter: needs the package peft: pip install 'prunekit[lora]'.")
    if bare_model(model) is not model or adapter_layers(model):
        raise ConfigError("adapter: the model has adapters already. Merge or unload them first.")
    names = adapter_targets(model, targets)
    adapted = _adapted(model, names, rank, 2 * rank if alpha is None else alpha, dropout, seed)
    relocate_gates(model)
    return adapted


def _adapted(
    model: PreTrainedModel,
    names: str | list[str],
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
) -> PeftModel:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear

    causal = predicts_next_token(type(model), model.config)
    config = LoraConfig(
        task_type="CAUSAL_LM" if causal else None,
        r=rank,
        lora_alpha=alpha,  # pyright: ignore  also a fraction
        lora_dropout=dropout,
        target_modules=names,
        fan_in_fan_out=any(map(stored_transposed, model.modules())),
    )
    config._register_custom_module({SparseLinear: Linear})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type.*SparseLinear", UserWarning)
        # Of a name of transformers that peft uses.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    for layer in adapter_layers(model).values():
        layer.train(base_layer(layer).training)
    return adapted  # pyright: ignore  of one kind of adapter


def _check_numbers(rank: int, alpha: float | None, dropout: float) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"adapter: rank {rank!r} is not a whole number of at least 1.")
    if alpha is not None and not alpha > 0:
        raise ConfigError(f"adapter: alpha {alpha!r} is not a positive number.")
    if not 0 <= dropout < 1:
        raise ConfigError(f"adapter: dropout {dropout!r} is not in [0, 1).")


def relocate_gates(model: Any) -> None:  # noqa: ANN401  any model of torch
    """Attach the gates of a model again after adapters changed."""
    for kind in KINDS:
        if gates := attached_gates(model, kind):
            gates.relocate()


@torch.no_grad()
def merge_low_rank(
    layer: nn.Module,
    down: Float[Tensor, "R I"],
    up: Float[Tensor, "O R"],
    scale: float = 1.0,
) -> None:
    """Add ``scale · up · down`` to the nonzero weights of a linear layer.

    The weight changes in place. The part of the product at pruned weights is dropped, so the
    outputs of a merged model differ slightly from those of the model with a separate adapter.

    Args:
        layer: Linear, Conv1D or sparse; of a sparse layer the stored values change, not the mask.
        down: The adapter's first factor (``lora_A``).
        up: The adapter's second factor (``lora_B``).
        scale: Usually alpha divided by the rank.
    """
    _add_where_kept(layer, scale * (up.float() @ down.float()))


@torch.no_grad()
def merge_adapters(model: PeftModel, adapter: str = "default") -> PreTrainedModel:
    """Merge a ``peft`` adapter into a pruned model, and return the model.

    Zeros remain zero, whereas ``merge_and_unload`` of peft would fill them. The output is that of
    the model whose adapter was masked; see :func:`prunekit.training.mask_adapters`. Gates that the
    model has remain on it.

    Args:
        model: The model returned by ``peft.get_peft_model`` or ``PeftModel.from_pretrained``.
        adapter: Name of the LoRA adapter.

    Raises:
        ConfigError: The model has no such adapter, or one that is not a sum (DoRA, biases, already
            merged), of a quantized or a shared weight; or another adapter is active, or tokens were
            trained beside it, which would be lost. Nothing is changed then.
    """
    layers = [layer for layer, _ in masked_layers(model, adapter, "merge_adapters")]
    if not hasattr(model, "unload"):
        raise ConfigError("merge_adapters: pass the model of peft (PeftModel), not the one in it.")
    _check_alone(model, adapter)
    _check_untied(model, layers)
    for layer in layers:
        base = base_layer(layer)
        _add_where_kept(base, outputs_first(base, layer.get_delta_weight(adapter)))
    merged: Any = model.unload()
    relocate_gates(merged)
    return merged


def _check_alone(model: PeftModel, adapter: str) -> None:
    """Refuse a model with trained values outside of the adapter."""
    layers: dict[str, Any] = adapter_layers(bare_model(model))
    active: set[str] = set()
    for path, layer in layers.items():
        if "token_adapter" in layer._modules:
            raise ConfigError(
                f"merge_adapters: single tokens of {path} were trained and would be lost. Merge "
                "with merge_and_unload of peft while mask_adapters is in force."
            )
        active.update(layer.active_adapters if adapter in layer.active_adapters else ())
    if others := sorted(active - {adapter}):
        raise ConfigError(
            f"merge_adapters: {others[0]!r} is active too and would be lost. Choose one adapter: "
            f"model.set_adapter({adapter!r})."
        )


def _check_untied(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    users: dict[nn.Parameter, list[str]] = {}
    for name, parameter in bare_model(model).named_parameters(remove_duplicate=False):
        users.setdefault(parameter, []).append(name)
    for layer in layers:
        weight: Any = getattr(base_layer(layer), "weight", None)
        if len(names := users.get(weight, [])) > 1:
            raise ConfigError(
                f"merge_adapters: {' and '.join(names)} are one weight, so that the adapter of one "
                "would change both. Untie them first."
            )


def _add_where_kept(layer: nn.Module, delta: Float[Tensor, "O I"]) -> None:
    if isinstance(layer, SparseLinear):
        layer.set_kept(layer.dense().float() + delta)
        return
    weight = weight_matrix(layer)
    weight.copy_((weight.float() + delta) * (weight != 0))
