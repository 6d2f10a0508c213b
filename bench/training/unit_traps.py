"""Traps of removing units while training, tried on the contestants.

Each trap is a function that returns "yes" where a contestant does right, otherwise its mistake.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.jobs.end_to_end import SHARED
from bench.training.others import ABSENT, installed, quiet
from bench.training.task import Ask, train_step
from bench.training.unit_contestants import (
    Train,
    Trained,
    fasterai_units,
    ours,
    torch_pruning,
)
from prunekit.models import stock

YES = "yes"
MODEL = SHARED / "models/stories260K"
"""A Llama: Torch-Pruning cannot trace the Conv1D of GPT-2."""
ASK = Ask(0.5, end=7, every=3)
STEPS = 9
CONTESTANTS: dict[str, tuple[str, Train]] = {
    "Torch-Pruning, one optimizer": ("torch_pruning", partial(torch_pruning, anew=False)),
    "Torch-Pruning, a new one each time": ("torch_pruning", partial(torch_pruning, anew=True)),
    "fasterai's PruneCallback": ("fasterai", fasterai_units),
    "neurons.during, finalize": ("prunekit", ours),
}
"""The library of each, and how it trains."""
Trap = Callable[[Train], str]


def _trained(train: Train, freeze: Callable[[PreTrainedModel], object] = lambda _: None) -> Trained:
    """Train a new model, and prune half of its neurons."""
    torch.manual_seed(0)
    model = stock.open_model(MODEL, dtype=torch.float32).train()
    freeze(model)
    batches = torch.randint(3, model.config.vocab_size, (STEPS, 2, 16))
    with quiet():
        return train(model, [*batches], ASK)


def _cut(model: PreTrainedModel) -> list[Tensor]:
    """Return the weights that are cut."""
    return [each for block in model.model.layers for each in block.mlp.parameters()]


def share_is_reached(train: Train) -> str:
    """Half of the neurons are gone where `end` is no multiple of `every`."""
    model = _trained(train).model
    widths = {block.mlp.up_proj.weight.shape[0] for block in model.model.layers}
    wanted = stock.open_model(MODEL).config.intermediate_size // 2
    return YES if widths == {wanted} else f"no: {sorted(widths)} remain instead of {wanted}"


def all_are_trained(train: Train) -> str:
    """The next step trains all parameters of the smaller model."""
    done = _trained(train)
    before = {name: each.detach().clone() for name, each in done.model.named_parameters()}
    train_step(done.model, done.optimizer, torch.arange(3, 35).view(2, 16))
    still = [
        name for name, each in done.model.named_parameters() if torch.equal(each, before[name])
    ]
    return YES if not still else f"no: {len(still)} of {len(before)} are not"


def state_is_kept(train: Train) -> str:
    """Adam continues with the state of the kept weights."""
    done = _trained(train)
    steps = [done.optimizer.state.get(each, {}).get("step", 0) for each in _cut(done.model)]
    fewest = int(min(steps))
    return YES if fewest == STEPS else f"no: it knows {fewest} of {STEPS} steps"


def none_is_held(train: Train) -> str:
    """The optimizer holds the smaller model's weights, no others."""
    done = _trained(train)
    held = {each for group in done.optimizer.param_groups for each in group["params"]}
    others = held - {*done.model.parameters()}
    return YES if not others else f"no: {len(others)} others"


def frozen_remain(train: Train) -> str:
    """Frozen weights that are cut do not thaw."""

    def freeze(model: PreTrainedModel) -> None:
        for each in model.model.layers[0].mlp.parameters():
            each.requires_grad_(False)  # noqa: FBT003  its name differs between classes

    model = _trained(train, freeze).model
    thawed = sum(each.requires_grad for each in model.model.layers[0].mlp.parameters())
    return YES if not thawed else f"no: {thawed} of 3"


def opens_again(train: Train) -> str:
    """`from_pretrained` opens what `save_pretrained` wrote, with the same output."""
    model, ids = _trained(train).model.eval(), torch.arange(3, 35).view(2, 16)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        try:
            opened = stock.open_model(Path(folder), dtype=torch.float32)
        except RuntimeError:
            return "no: refused, its config has other shapes"
        return YES if torch.equal(opened.eval()(ids).logits, model(ids).logits) else "no: differs"


TRAPS: tuple[Trap, ...] = (
    share_is_reached,
    all_are_trained,
    state_is_kept,
    none_is_held,
    frozen_remain,
    opens_again,
)


def tried() -> list[dict[str, str]]:
    """Return a row for each trap: its title, and the outcome of each contestant."""
    return [
        {"trap": (trap.__doc__ or "").strip()}
        | {
            name: trap(train) if installed(library) else ABSENT
            for name, (library, train) in CONTESTANTS.items()
        }
        for trap in TRAPS
    ]
