"""Ways to remove neurons while a model is trained: ours, and those of libraries of others."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

import prunekit
from bench.training.others import fasterai
from bench.training.task import Ask, cubic, due_steps, train_step

RATE = 1e-3


@dataclass(frozen=True)
class Trained:
    """A smaller model, and the optimizer that trained it to the end."""

    model: PreTrainedModel
    optimizer: Optimizer


Train = Callable[[PreTrainedModel, list[Tensor], Ask], Trained]
"""Trains a model on batches of token ids [B, T], and removes neurons of it."""


def new_optimizer(model: nn.Module) -> AdamW:
    """Return an optimizer of what is not frozen."""
    return AdamW([each for each in model.parameters() if each.requires_grad], lr=RATE)


def ours(model: PreTrainedModel, batches: list[Tensor], ask: Ask) -> Trained:
    """Close gates on a schedule, cut at its end, train on."""
    optimizer, neurons = new_optimizer(model), prunekit.neurons(model)
    settings = {"scope": "layer", "sparsity": ask.sparsity, "end": ask.end, "every": ask.every}
    with neurons.during(optimizer, "magnitude", **settings):
        for batch in batches[: ask.end]:
            train_step(model, optimizer, batch)
    neurons.finalize(optimizer=optimizer)
    neurons.detach()
    for batch in batches[ask.end :]:
        train_step(model, optimizer, batch)
    return Trained(model, optimizer)


def _feed_forwards(model: PreTrainedModel) -> dict[str, Any]:
    """Return the arguments by which Torch-Pruning removes neurons alone."""
    parts = [
        [getattr(block.mlp, name) for name in ("gate_proj", "up_proj", "down_proj")]
        for block in model.model.layers
    ]
    own = {each for part in parts for each in part}
    layers = [each for each in model.modules() if isinstance(each, nn.Linear | nn.Embedding)]
    return {
        "roots": [part[0] for part in parts],
        "ignored_layers": [each for each in layers if each not in own],
        "output_transform": lambda output: output.logits.sum(),
    }


def torch_pruning(
    model: PreTrainedModel, batches: list[Tensor], ask: Ask, *, anew: bool
) -> Trained:
    """Cut by Torch-Pruning's ``MetaPruner`` at each due step.

    Args:
        model: The model.
        batches: Token ids of each step.
        ask: What is to be done.
        anew: Make a new optimizer after each cut.
    """
    library, due = import_module("torch_pruning"), [*due_steps(ask)]
    found = _feed_forwards(model)
    pruner = library.pruner.MetaPruner(
        model,
        batches[0],
        library.importance.GroupMagnitudeImportance(),
        pruning_ratio_dict=dict.fromkeys(found.pop("roots"), ask.sparsity),
        iterative_steps=len(due),
        iterative_pruning_ratio_scheduler=lambda ratio, _: [
            0.0,
            *(cubic(step, ask) / ask.sparsity * ratio for step in due),
        ],
        **found,
    )
    optimizer = new_optimizer(model)
    for step, batch in enumerate(batches, 1):
        train_step(model, optimizer, batch)
        if step in due:
            pruner.step()
            optimizer = new_optimizer(model) if anew else optimizer
    return Trained(model, optimizer)


def fasterai_units(model: PreTrainedModel, batches: list[Tensor], ask: Ask) -> Trained:
    """Cut by fasterai's ``PruneCallback`` of a Learner of fastai."""
    core, basics = fasterai("core.all"), import_module("fastai.basics")
    found = _feed_forwards(model)
    callback = fasterai("prune.all").PruneCallback(
        dict.fromkeys(found.pop("roots"), ask.sparsity),
        core.Schedule(core.sched_agp),
        "local",
        core.large_final,
        example_inputs=batches[0],
        **found,
    )
    samples = [(each, each) for batch in batches for each in batch]
    loader = basics.DataLoader(samples, bs=len(batches[0]), shuffle=False, num_workers=0)

    def loss(output: Any, ids: Tensor) -> Tensor:  # noqa: ANN401
        return nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )

    learner = basics.Learner(
        basics.DataLoaders(loader, loader),
        model,
        loss_func=loss,
        opt_func=partial(basics.OptimWrapper, opt=AdamW),
        cbs=[callback],
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=RATE)
    return Trained(model, learner.opt.opt)
