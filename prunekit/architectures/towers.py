"""Blocks of vision towers, found in one forward on an image.

Weights are fake tensors, without data; the inputs are real, since towers read sizes of images as
numbers. What is computed with a weight is fake, everything else is real.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from prunekit.architectures.base import Architecture, Stack
from prunekit.architectures.block_lists import outermost_lists
from prunekit.architectures.coverage import check_coverage, named_linears
from prunekit.architectures.forward_trace import (
    FORWARD_ERRORS,
    ForwardTrace,
    record_into,
)
from prunekit.architectures.origins import TensorIdentity, identity
from prunekit.architectures.probing import dense_linears, stages_per_block
from prunekit.errors import CheckpointError


@dataclass
class _BlockCalls:
    """Calls of the blocks of one list in a forward.

    Attributes:
        first: Number of calls of blocks of other lists before the first.
        order: Names of the blocks in the order of their calls.
        broken: A block's input is not the output of the block before.
        width: Features of the hidden states.
    """

    first: int = -1
    order: list[str] = field(default_factory=list)
    broken: bool = False
    width: int = 0
    _output: TensorIdentity | None = None

    def before(
        self,
        name: str,
        kept: list[Any],
        _: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Note the call of a block."""
        self.first = len(kept) if self.first < 0 else self.first
        hidden: Any = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            self.broken = True
            return
        self.broken |= self._output not in {None, identity(hidden)}
        self.width = hidden.shape[-1]
        self.order.append(name)

    def after(self, kept: list[Any], _: nn.Module, __: tuple[Any, ...], result: object) -> None:
        """Note the output of a block."""
        output: Any = result[0] if isinstance(result, tuple | list) else result
        kept.append(result)  # a later tensor could reuse the identity of a freed one
        self._output = identity(output)


def probe_towers(
    model: PreTrainedModel, architecture: Architecture, inputs: Mapping[str, Tensor]
) -> tuple[Stack, ...]:
    """Return the stacks of a model's vision towers, in execution order.

    A tower is the module that transformers calls the encoder of images, or else any beside the
    text; its blocks are the lists in it whose modules pass hidden states on to each other.

    Args:
        model: The model; it may be on the meta device.
        architecture: Its architecture, of the text.
        inputs: What its processor makes of one image with text.

    Raises:
        CheckpointError: It has no tower with such blocks, or does not run on the inputs.
    """
    base = cast("PreTrainedModel", model.base_model)
    names = {module: name for name, module in base.named_modules()}
    tower = names.get(base.get_encoder(modality="image"), "")
    text = {stack.blocks for stack in architecture.stacks}
    candidates = [
        name
        for name in outermost_lists(base)
        if name not in text and (not tower or name.startswith(f"{tower}."))
    ]
    trace, calls, error = _traced(base, candidates, inputs)
    found = [name for name in candidates if _is_chain(base, name, calls[name])]
    if not found:
        why = f" ({error})" if error else ""
        raise CheckpointError(
            f"model.part: {type(model).__name__} has no list of blocks that an image passes "
            f"through{why}, so there is no vision tower to prune. Leave model.part out."
        )
    found.sort(key=lambda name: calls[name].first)
    stacks = tuple(_stack(base, name, trace, calls[name].width) for name in found)
    for stack in stacks:
        check_coverage(model, stack)
    return stacks


@torch.no_grad()
def _traced(
    base: PreTrainedModel, lists: list[str], inputs: Mapping[str, Tensor]
) -> tuple[ForwardTrace, dict[str, _BlockCalls], Exception | None]:
    """Run a copy with fake weights until their values are needed.

    Otherwise it runs to its end.
    """
    config: Any = copy.deepcopy(base.config)
    with (
        torch.inference_mode(mode=False),
        FakeTensorMode(allow_non_fake_inputs=True),
        no_init_weights(),
    ):
        fake = type(base)(config).eval()
    trace = ForwardTrace(fake, fake, {})
    kept: list[Any] = []
    for name, linear in named_linears(fake).items():
        linear.register_forward_hook(record_into(trace, name, kept))
    calls = {name: _BlockCalls() for name in lists}
    for name, noted in calls.items():
        for index, block in fake.get_submodule(name).named_children():
            block.register_forward_pre_hook(partial(noted.before, index, kept), with_kwargs=True)
            block.register_forward_hook(partial(noted.after, kept))
    try:
        with torch.inference_mode(mode=False):
            fake(**{name: value.clone() for name, value in inputs.items()})
    except FORWARD_ERRORS as error:  # what follows the towers may read numbers
        return trace, calls, error
    return trace, calls, None


def _is_chain(base: PreTrainedModel, blocks: str, calls: _BlockCalls) -> bool:
    """Return whether each block was called once, on its predecessor's output."""
    names = [name for name, _ in base.get_submodule(blocks).named_children()]
    return calls.order == names and not calls.broken


def _stack(base: PreTrainedModel, blocks: str, trace: ForwardTrace, width: int) -> Stack:
    dense = dense_linears(base, blocks, trace)
    per_block = stages_per_block(base, trace, blocks, dense)
    alike = all(stages == per_block[0] for stages in per_block)
    everywhere = [{name for stage in stages for name in stage.linears} for stages in per_block]
    return Stack(
        blocks,
        per_block[0] if alike else (),
        optional=frozenset(set().union(*everywhere) - set.intersection(*everywhere)),
        varied=() if alike else per_block,
        dense=tuple(sorted(dense.items())),
        tower=width,
    )
