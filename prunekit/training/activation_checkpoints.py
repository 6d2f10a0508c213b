"""Activations of blocks that are computed again for the gradient.

Of each block its input is stored alone. Hooks on the block itself run once; those on modules in it
run again, on values that no gradient follows.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prunekit.architectures import find_architecture
from prunekit.architectures.adapters import bare_model
from prunekit.models.layout import stack_runners
from prunekit.sparsify.in_memory import uncached
from prunekit.training.data_parallel import Losses, Objective, Share


def checkpointed_losses(objective: Objective, model: PreTrainedModel, share: Share) -> Losses:
    """Return the losses of an objective; blocks run again in the backward.

    Args:
        objective: The objective.
        model: The model.
        share: The share of the batch.
    """
    with checkpointed(model):
        return objective(model, share)


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Checkpoint the blocks of a model in forwards within the context.

    The backward may follow after it. Caches of keys and values are off.
    """
    bare = bare_model(model)
    stacks = stack_runners(bare, find_architecture(bare))
    with ExitStack() as stack:
        stack.enter_context(uncached(bare, stacks))
        for block in (block for runner in stacks for block in runner.blocks):
            stack.enter_context(_checkpointed(block))
        yield


@contextmanager
def _checkpointed(block: nn.Module) -> Iterator[None]:
    before = vars(block).get("forward")
    vars(block)["forward"] = partial(_run, block.forward)
    try:
        yield
    finally:
        if before is None:
            del vars(block)["forward"]
        else:
            vars(block)["forward"] = before


def _run(forward: Any, *inputs: Any, **options: Any) -> Any:  # noqa: ANN401  as the block has them
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
