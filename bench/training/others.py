"""Pruning libraries of others in a training loop, where they are installed.

They are no dependency of prunekit, and stay out of its environment::

    pip install --no-deps --target FOLDER torch-pruning fasterai fastai fastcore fasttransform \
        "fastprogress<1.1" fastdownload plum-dispatch==2.5.8 beartype cloudpickle einops \
        "pandas<3" scipy scikit-learn joblib threadpoolctl narwhals pytz python-dateutil six
    PYTHONPATH=FOLDER python -m bench.training.gradual --traps
"""

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bench.training.task import AfterStep, Ask

ABSENT = "not installed"
"""Cell of a table whose library is absent."""


def fasterai(name: str) -> Any:  # noqa: ANN401
    """Return a module of fasterai, imported without torchvision, which its callbacks do not use."""
    for part, stands_in in (("vision", "basics"), ("callback", "callback.schedule")):
        with warnings.catch_warnings(action="ignore"):
            sys.modules.setdefault(f"fastai.{part}.all", import_module(f"fastai.{stands_in}"))
    return import_module(f"fasterai.{name}")


def installed(library: str) -> bool:
    """Return whether a library of others can be imported."""
    return find_spec(library) is not None


def versions() -> dict[str, str]:
    """Return the version of each library of the tables."""
    found = {}
    for library in ("torch", "torch-pruning", "fasterai"):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = ABSENT
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Discard what libraries of others print and warn of."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        yield


@contextmanager
def fasterai_masks(model: PreTrainedModel, _: Optimizer, ask: Ask) -> Iterator[AfterStep]:
    """Prune by fasterai's ``SparsifyCallback``, called as a Learner of fastai calls it."""
    core, steps = fasterai("core.all"), 2 * ask.end
    core.Granularities.add_granularity(Conv1D, {"weight": 0})
    with quiet():
        callback = fasterai("sparse.all").SparsifyCallback(
            sparsity=ask.sparsity,
            granularity="weight",
            context="local",
            criteria=core.large_final,
            schedule=core.Schedule(core.sched_agp, end_pct=0.5),
            layer_type=Conv1D,
        )
        learner = SimpleNamespace(model=model, n_epoch=1, epoch=0, training=True, pct_train=0.0)
        callback.learn = learner
        callback.before_fit()
        callback.before_epoch()
        callback.before_batch()
        done = 0

        def after_step() -> None:
            nonlocal done
            done += 1
            callback.after_step()
            learner.pct_train = done / steps
            callback.before_batch()

        yield after_step
        callback.after_fit()
