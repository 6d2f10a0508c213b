"""Pruning engine for large language models, configured by one TOML file.

The names in ``__all__`` are the public API; everything else may change. They are imported lazily,
so ``import prunekit`` is fast and code that needs no torch does not import it. No direct submodule
may have one of these names, because importing it would shadow the public name.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from prunekit._version import __version__ as __version__
from prunekit.inference import import_hook

if TYPE_CHECKING:
    from prunekit.allocations import Allocation
    from prunekit.architectures import Architecture
    from prunekit.config.load import load_config
    from prunekit.config.run_config import Config
    from prunekit.distributed.join import join
    from prunekit.errors import PrunekitError
    from prunekit.inference.sparse_linear import SparseLinear
    from prunekit.methods import Method
    from prunekit.models.load import load
    from prunekit.patterns import Pattern
    from prunekit.runs.jobs import plan, run
    from prunekit.runs.record import Record
    from prunekit.runs.sparsify.plan import Plan
    from prunekit.runs.stage import Stage
    from prunekit.sparsify.in_memory import prune
    from prunekit.statistics import Statistic
    from prunekit.structured.labelled_batches import labelled_batches
    from prunekit.structured.rankers import Ranker
    from prunekit.structured.unit_gates import blocks, experts, heads, hidden, neurons
    from prunekit.training.apt.loop import apt
    from prunekit.training.callback import PruneCallback
    from prunekit.training.gradual import GradualPruner

import_hook.install()

__all__ = [
    "Allocation",
    "Architecture",
    "Config",
    "GradualPruner",
    "Method",
    "Pattern",
    "Plan",
    "PruneCallback",
    "PrunekitError",
    "Ranker",
    "Record",
    "SparseLinear",
    "Stage",
    "Statistic",
    "apt",
    "blocks",
    "experts",
    "heads",
    "hidden",
    "join",
    "labelled_batches",
    "load",
    "load_config",
    "neurons",
    "plan",
    "prune",
    "run",
]

_HOMES = {
    "Allocation": "allocations",
    "Architecture": "architectures",
    "Config": "config.run_config",
    "GradualPruner": "training.gradual",
    "Method": "methods",
    "Pattern": "patterns",
    "Plan": "runs.sparsify.plan",
    "PruneCallback": "training.callback",
    "PrunekitError": "errors",
    "Ranker": "structured.rankers",
    "Record": "runs.record",
    "SparseLinear": "inference.sparse_linear",
    "Stage": "runs.stage",
    "Statistic": "statistics",
    "apt": "training.apt.loop",
    "blocks": "structured.unit_gates",
    "experts": "structured.unit_gates",
    "heads": "structured.unit_gates",
    "hidden": "structured.unit_gates",
    "join": "distributed.join",
    "labelled_batches": "structured.labelled_batches",
    "load": "models.load",
    "load_config": "config.load",
    "neurons": "structured.unit_gates",
    "plan": "runs.jobs",
    "prune": "sparsify.in_memory",
    "run": "runs.jobs",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
