"""Learn how an undeclared family treats its residual stream.

A coordinate can be taken out where nothing but RMSNorms read the stream, nothing mixes its
coordinates otherwise, and no number of the forward follows from the width. Tensors are followed
from the embeddings through pointwise operations; the forward of a model of twice the width shows
which numbers follow from it.

Shapes: D coordinates, T tokens.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from math import isclose, sqrt
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.architectures import Architecture, Stream
from prunekit.architectures.block_lists import BlockList
from prunekit.architectures.coverage import LINEAR_TYPES, base_model_prefix
from prunekit.architectures.forward_trace import (
    FORWARD_ERRORS,
    ForwardTrace,
    run_again,
    traced_forward,
)
from prunekit.architectures.origins import TOKENS
from prunekit.errors import ShapeError
from prunekit.models.units.coordinates import (
    CoordinateAxis,
    coordinate_axes,
    width_key,
)
from prunekit.models.units.meta_model import meta_model
from prunekit.models.units.stream_trace import Number, StreamTrace, follow


def probe_stream(
    model: PreTrainedModel, architecture: Architecture, fixed: Mapping[str, int]
) -> Stream:
    """Return how a model treats its residual stream.

    Args:
        model: A model of a family that is not declared; it may be on the meta device.
        architecture: What was probed of it.
        fixed: Its :func:`~prunekit.models.units.coordinates.head_sizes`.

    Raises:
        ShapeError: Coordinates cannot be taken out; the message says what forbids it.
    """
    size = model.config.hidden_size
    usual, wider = (
        meta_model(model, {width_key(model): width, **fixed}, "hidden")
        for width in (size, 2 * size)
    )
    paths = {module: path for path, module in usual.named_modules()}
    axes = coordinate_axes(usual, fixed)
    norms = {paths[each.module]: each.module for each in axes if is_norm(each)}
    if not norms:
        raise _refused("no norm reads the stream")
    found = {path: _rms_norm(path, norm) for path, norm in norms.items()}
    if len({*found.values()}) != 1:
        raise _refused("norms differ in their offset or epsilon")
    ((offset, epsilon),) = {*found.values()}
    entry = _epsilon_entry(model, norms, epsilon)
    owners = {paths[each.module]: each for each in axes if paths[each.module] not in norms}
    numbers = (_numbers(each, architecture, owners, norms) for each in (usual, wider))
    scaled = _scales(*numbers) | _embeddings_scale(usual, wider)
    return Stream(epsilon=entry, offset=offset, scaled=scaled)


def is_norm(axis: CoordinateAxis) -> bool:
    """Return whether an axis is that of a norm's weight."""
    ordinary = isinstance(axis.module, (*LINEAR_TYPES, nn.Embedding))
    return axis.name == "weight" and axis.parameter.ndim == 1 and not ordinary


def _refused(reason: str) -> ShapeError:
    return ShapeError(
        f"hidden: coordinates cannot be taken out: {reason}. Take out heads, neurons or blocks "
        "instead."
    )


def _rms_norm(path: str, norm: nn.Module) -> tuple[float, float]:
    """Return offset and epsilon of a norm, whose formula is tried.

    Raises:
        ShapeError: It is no RMSNorm.
    """
    own = copy.deepcopy(norm).to_empty(device="cpu").float()
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(cast("Tensor", own.weight).shape, generator=random)
    own.weight = nn.Parameter(weight, requires_grad=False)
    for epsilon in {value for value in vars(norm).values() if isinstance(value, float)}:
        x = torch.randn(TOKENS, len(weight), generator=random) * sqrt(abs(epsilon))
        try:
            with torch.inference_mode():
                output = own(x)
        except FORWARD_ERRORS:
            break  # it reads more than the stream
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
        for offset in (0.0, 1.0):
            if torch.allclose(output, normed * (weight + offset), rtol=1e-3, atol=1e-4):
                return offset, epsilon
    raise _refused(
        f"{path} is no RMSNorm; a mean over fewer coordinates, for one, is another, so that no "
        "smaller model answers as the gated one"
    )


def _epsilon_entry(model: PreTrainedModel, norms: Mapping[str, nn.Module], epsilon: float) -> str:
    """Return the entry of ``config.json`` that all norms take their epsilon from.

    Raises:
        ShapeError: There is none.
    """
    for name, value in model.config.to_dict().items():
        if isinstance(value, float) and value == epsilon:
            other = meta_model(model, {name: 2 * epsilon}, "hidden")
            numbers = {path: vars(module).values() for path, module in other.named_modules()}
            if all(2 * epsilon in numbers[path] for path in norms):
                _refuse_other_norms(other, norms, epsilon)
                return name
    raise _refused(f"no entry of its config sets the epsilon of the norms, {epsilon}")


def _refuse_other_norms(
    changed: PreTrainedModel, norms: Mapping[str, nn.Module], epsilon: float
) -> None:
    """Refuse norms of another class that share the epsilon.

    Those of the same class are of queries, keys or latents, whose mean square is far above
    it; those of states of linear attention, which have a class of their own, may be near it.

    Raises:
        ShapeError: There is one.
    """
    classes = {type(norm) for norm in norms.values()}
    for path, module in changed.named_modules():
        has_weight = "weight" in module._parameters
        if has_weight and 2 * epsilon in vars(module).values() and type(module) not in classes:
            raise _refused(
                f"{path} is not of the residual stream, and takes its epsilon from the same entry "
                "of the config, which would have to change"
            )


def _numbers(
    model: PreTrainedModel,
    architecture: Architecture,
    owners: Mapping[str, CoordinateAxis],
    norms: Iterable[str],
) -> list[Number]:
    """Return the numbers of a forward through which the coordinates are followed.

    Raises:
        ShapeError: Something but norms reads the stream, or combines its coordinates.
    """
    (stack,) = architecture.stacks
    blocks = f"{base_model_prefix(model)}{stack.blocks}"
    try:
        with traced_forward(model, BlockList(blocks)) as found:
            ids = {"input_ids": torch.zeros(1, TOKENS, dtype=torch.int64)}
            again = ForwardTrace(found.model, found.model, ids, reads_ids=True)
            trace = StreamTrace()
            for path, axis in owners.items():
                module = found.model.get_submodule(path)
                follow(trace, path, module, axis, is_expert=path in found.experts)
            for path in norms:
                norm = found.model.get_submodule(path)
                norm.register_forward_pre_hook(trace.before_norm)
                norm.register_forward_hook(trace.after_norm)
            with trace:
                run_again(again)
    except FORWARD_ERRORS as error:
        raise _refused(f"its forward does not run on fake tensors ({error})") from error
    if trace.faults:
        raise _refused(next(iter(trace.faults)))
    return trace.numbers


def _scales(numbers: Sequence[Number], wider: Sequence[Number]) -> bool:
    """Return whether embeddings are multiplied by the root of the width.

    Raises:
        ShapeError: Another number follows from the width.
    """
    if [each.operation for each in numbers] != [each.operation for each in wider]:
        raise _refused("its forward takes other steps where the width is another")
    scales = False
    for number, other in zip(numbers, wider, strict=True):
        if number.value == other.value:
            continue
        if not (number.scales and isclose(other.value, number.value * sqrt(2), rel_tol=1e-2)):
            raise _refused(
                f"its forward calls {number.operation} with {number.value:g}, which follows from "
                "the width"
            )
        scales = True
    return scales


def _embeddings_scale(usual: PreTrainedModel, wider: PreTrainedModel) -> bool:
    """Return whether the embeddings hold the root of the width.

    Raises:
        ShapeError: A buffer or a factor elsewhere follows from the width.
    """
    embeddings, scales = usual.get_input_embeddings(), False
    for path, module in usual.named_modules():
        other = vars(wider.get_submodule(path))
        for name, value in vars(module).items():
            if isinstance(value, float) and module is not embeddings and value != other.get(name):
                raise _refused(f"{path}.{name} = {value:g} follows from the width")
    others = dict(wider.named_buffers())
    for path, buffer in usual.named_buffers():
        other = others.get(path)
        if other is not None and buffer.shape == other.shape and torch.equal(buffer, other):
            continue
        inside = any(buffer is each for each in embeddings.buffers())
        if other is None or not (inside and torch.allclose(other, buffer * sqrt(2), rtol=1e-2)):
            raise _refused(f"the buffer {path} follows from the width")
        scales = True
    return scales
