"""One model type tried end to end: planned, pruned, opened by stock transformers, checked.

The masks are computed a second time, from the dense model alone: a dispatch mode sees every
product of a matrix with inputs, whatever module made it. So a linear that reads another tensor than
prunekit thinks, or an expert that is pruned as another one, has another mask.

Shapes: O output features, I input features, T tokens.
"""

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from prunekit.errors import PrunekitError
from prunekit.models.empty_model import empty_model
from prunekit.models.units.kinds import Kind
from prunekit.runs.sparsify.plan import Plan
from prunekit.runs.sparsify.run import SparsifyRun
from tests.support.checkpoints import TEXT, planned, tokenizer
from tests.support.family_configs import model_class, tiny_config
from tests.support.family_units import answers, removable, unit_problem

aten = torch.ops.aten
LARGEST = 20_000_000
"""Parameters of the largest model that is tried."""
NEAR = 1e-4
"""Relative difference of scores that rounding explains."""


@dataclass
class Outcome:
    """What happened to a model type.

    Attributes:
        result: "works", "refused", "not built", or a fault: "crashed", "wrong".
        reason: Why it does not work; "" if it does.
        pruned: Number of linears that were pruned.
        experts: Number of those that are of experts.
        dense: What stays dense in blocks and around them, from the notes of the plan.
        units: Kinds of units that can be removed.
    """

    result: str
    reason: str = ""
    pruned: int = 0
    experts: int = 0
    dense: list[str] = field(default_factory=list)
    units: list[str] = field(default_factory=list)

    def dump(self) -> dict[str, Any]:
        """Return the fields that are not empty."""
        return {name: value for name, value in asdict(self).items() if value}


def trial(case: str, folder: Path) -> Outcome:
    """Prune the tiny model of a case and check the result.

    Args:
        case: ``task:model_type``.
        folder: Empty folder for the checkpoints; removed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            kind = _write_model(*case.split(":"), folder / "dense")
        except Exception as error:
            return Outcome("not built", _line(error, folder))
        try:
            plan, tokens = _run(folder)
            problems = [*find_problems(kind, folder, plan, tokens)]
            units = removable(empty_model(plan.checkpoint), plan.checkpoint)
            problems += filter(None, _unit_problems(kind, folder / "dense", units))
        except PrunekitError as error:
            return Outcome("refused", _line(error, folder))
        except Exception as error:
            return Outcome("crashed", _line(error, folder))
        finally:
            shutil.rmtree(folder / "written", ignore_errors=True)
    result = "wrong" if problems else "works"
    linears = [linear for block in plan.blocks for linear in block.pruned]
    return Outcome(
        result,
        "; ".join(problems[:3]),
        len(linears),
        sum(linear.expert is not None for linear in linears),
        sorted(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", note) for note in _dense(plan))),
        units,
    )


def _unit_problems(
    kind: type[PreTrainedModel], dense: Path, units: Sequence[Kind]
) -> Iterator[str | None]:
    """Yield what is wrong after units of a kind were removed, each from the dense model."""
    for each in units:
        if each in {"heads", "neurons", "hidden"}:
            yield unit_problem(_opened(kind, dense), each, torch.arange(1, 13)[None])


def _line(error: Exception, folder: Path) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split()).replace(str(folder), "")
    return text.partition(" Declare the family")[0][:300]


def _dense(plan: Plan) -> list[str]:
    return [note for note in plan.notes if " dense" in note]


@torch.no_grad()
def _write_model(task: str, model_type: str, folder: Path) -> type[PreTrainedModel]:
    """Write a random model in which no weight is NaN, constant or zero."""
    config = tiny_config(model_type)
    kind = model_class(task, config)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(f"the tiny model has {size} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or not weight.isfinite().all():
                weight.normal_(0, 0.1)
            elif weight.numel() > 1 and weight.std() == 0:
                weight.add_(torch.randn_like(weight) * (0.05 if "norm" in name.lower() else 0.02))
    answers(model, torch.arange(1, 13)[None])
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return kind


def _run(folder: Path) -> tuple[Plan, Tensor]:
    """Prune half of each row; return the plan and the calibration tokens."""
    prune = {"pattern": "unstructured", "sparsity": 0.5, "starved_below": 1, "propagation": "block"}
    plan = planned(folder / "dense", folder / "written", prune=prune)
    job = SparsifyRun(plan)
    list(job.records(resume=False, overwrite=False))
    return plan, job._texts()[0].ids


def find_problems(
    kind: type[PreTrainedModel],
    folder: Path,
    plan: Plan,
    tokens: Tensor | Sequence[Mapping[str, Tensor]],
) -> Iterator[str]:
    """Yield each way in which the written model is not the dense one, pruned.

    Args:
        kind: Class of the model.
        folder: Folder with ``dense`` and ``written`` checkpoints.
        plan: The plan of the run.
        tokens: Its calibration tokens, or batches of inputs.
    """
    dense, written = (_opened(kind, folder / name) for name in ("dense", "written"))
    before, after = dict(dense.named_parameters()), dict(written.named_parameters())
    blocks = [block.name for block in plan.blocks]
    for name, weight in after.items():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        same = torch.equal(weight, before[name])
        if not inside and not same:
            yield f"{name} changed outside of the blocks"
        matrix = weight.ndim > 1 and min(weight.shape[-2:]) > 1 and not name.endswith("_bias")
        if inside and same and matrix and not is_noted(name, plan.notes):
            yield f"{name} is dense without a note"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if not changed:
        yield "nothing was pruned"
    for block in blocks:
        names = {name for name in changed if name.startswith(f"{block}.")}
        yield from _wrong_masks(dense, {name: after[name] for name in names}, tokens)
        with torch.no_grad():
            for name in names:
                before[name].copy_(after[name])


def _opened(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """Open a checkpoint with transformers, its experts in a loop."""
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    opened: Any = kind.from_pretrained(folder, output_loading_info=True, **options)
    model, found = opened
    assert not found["missing_keys"], f"transformers misses {sorted(found['missing_keys'])[:3]}"
    return model.eval()


def is_noted(name: str, notes: tuple[str, ...]) -> bool:
    """Return whether a note names a parameter or its module, with ``*`` for numbers."""
    words = {word.rstrip(".,:") for note in notes for word in note.split()}
    patterns = [re.escape(word).replace(r"\*", r"\d+") for word in words if "." in word]
    names = (name, name.rpartition(".")[0])
    return any(re.fullmatch(pattern, each) for pattern in patterns for each in names)


def _wrong_masks(
    model: PreTrainedModel,
    pruned: dict[str, Tensor],
    tokens: Tensor | Sequence[Mapping[str, Tensor]],
) -> Iterator[str]:
    """Yield weights of a block whose zeros are not those of Wanda.

    Args:
        model: The model; its blocks before this one are pruned.
        pruned: Weights of the block, as written.
        tokens: The calibration tokens, or batches of inputs.
    """
    weights = {name: model.get_parameter(name) for name in pruned}
    with _Products(weights) as products:
        answers(model, tokens)
    right: set[tuple[str, int]] = set()
    wrong: dict[tuple[str, int], str] = {}
    for (name, offset, shape, stride), energy in products.found.items():
        place = shape, stride, weights[name].storage_offset() + offset
        dense, sparse = (each.data.as_strided(*place).T for each in (weights[name], pruned[name]))
        if dense.shape[1] != len(energy):
            continue
        if problem := _mask_problem(dense, sparse, energy):
            wrong[name, offset] = problem
        else:
            right.add((name, offset))
    seen = {name for name, _ in (*right, *wrong)}
    # An expert to which no token is routed is pruned by all tokens instead.
    never = (name for name in pruned.keys() - seen if "expert" not in name)
    yield from (f"{name} is never multiplied" for name in never)
    # The other orientation of a square matrix fits no mask; one that fits is enough.
    yield from (f"{at[0]}: {problem}" for at, problem in wrong.items() if at not in right)


def _mask_problem(dense: Tensor, sparse: Tensor, energy: Tensor) -> str | None:
    score = dense.abs().double() * energy.sqrt()
    count = dense.shape[1] // 2
    expected = torch.ones_like(dense, dtype=torch.bool)
    expected.scatter_(1, score.argsort(dim=1, stable=True)[:, :count], value=False)
    threshold = score.sort(1).values[:, count - 1 : count + 1].mean(1, keepdim=True)
    near = (score - threshold).abs() <= NEAR * threshold
    keep = sparse != 0
    if differing := int(((expected != keep) & ~near).sum()):
        return f"{differing} zeros elsewhere"
    return None if torch.equal(sparse[keep], dense[keep]) else "kept weights changed"


class _Products(TorchDispatchMode):
    """Sums the squares of inputs that are multiplied with parts of weights.

    Attributes:
        found: Sums [I] by name of the weight, and offset, shape and strides of the part.
    """

    def __init__(self, weights: dict[str, Any]) -> None:
        super().__init__()
        self.found: dict[tuple[Any, ...], Tensor] = {}
        self._spans = {
            name: range(each.data_ptr(), each.data_ptr() + each.nbytes, each.itemsize)
            for name, each in weights.items()
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for x, weight in _factors(func.overloadpacket, args):
            self._note(x, weight)
            self._note(weight.T, x.T)
        return func(*args, **(kwargs or {}))

    def _note(self, x: Tensor, weight: Tensor) -> None:
        start = weight.data_ptr()
        for name, span in self._spans.items():
            if start in span:
                key = (name, span.index(start), tuple(weight.shape), weight.stride())
                self.found[key] = self.found.get(key, 0) + x.double().square().sum(0)


def _factors(operation: Any, args: tuple[Any, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    if operation is aten.mm:
        yield args[0], args[1]
    elif operation is aten.addmm:
        yield args[1], args[2]
    elif operation is aten.linear:
        yield args[0].flatten(0, -2), args[1].T
    elif operation is aten.bmm:
        yield from zip(args[0], args[1], strict=True)
