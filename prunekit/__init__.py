"""The pruning engine for large language models: one TOML in, a proven sparse checkpoint out.

What this namespace holds is promised; the rest may change. Names are imported when they are first
used, so that ``import prunekit`` is quick and what needs no torch does not wait for it. No module
of the package may be called like one of these names: importing it would hide the function.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from prunekit import hook

if TYPE_CHECKING:
    from prunekit.allocations import Allocation
    from prunekit.architectures import Architecture
    from prunekit.config import Config, load_config
    from prunekit.errors import PrunekitError
    from prunekit.framing import Record
    from prunekit.gated import blocks, heads, hidden, neurons
    from prunekit.inplace import prune
    from prunekit.jobs import plan, run
    from prunekit.methods import Method
    from prunekit.patterns import Pattern
    from prunekit.planning import Plan
    from prunekit.rankers import Ranker
    from prunekit.ranks import join
    from prunekit.shrunk import load
    from prunekit.sparse_linear import SparseLinear
    from prunekit.statistics import Statistic

__version__ = "0.1.0"

hook.install()

__all__ = [
    "Allocation",
    "Architecture",
    "Config",
    "Method",
    "Pattern",
    "Plan",
    "PrunekitError",
    "Ranker",
    "Record",
    "SparseLinear",
    "Statistic",
    "blocks",
    "heads",
    "hidden",
    "join",
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
    "Config": "config",
    "Method": "methods",
    "Pattern": "patterns",
    "Plan": "planning",
    "PrunekitError": "errors",
    "Ranker": "rankers",
    "Record": "framing",
    "SparseLinear": "sparse_linear",
    "Statistic": "statistics",
    "blocks": "gated",
    "heads": "gated",
    "hidden": "gated",
    "join": "ranks",
    "load": "shrunk",
    "load_config": "config",
    "neurons": "gated",
    "plan": "jobs",
    "prune": "inplace",
    "run": "jobs",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
