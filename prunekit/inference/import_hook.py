"""Tells transformers, once it is imported, how to load what prunekit compressed.

``import prunekit`` installs this. Until transformers imports the module in which quantizers are
registered, it costs nothing: neither torch nor transformers is imported for it.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

QUANTIZERS = "transformers.quantizers.auto"


def install() -> None:
    """Register now if transformers has that module already, or as soon as it has."""
    if QUANTIZERS in sys.modules:
        _register(sys.modules[QUANTIZERS])
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register(auto: ModuleType) -> None:
    from prunekit.checkpoint.compressed import METHOD

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        from prunekit.inference.hf_quantizer import SparseConfig, SparseQuantizer

        auto.register_quantization_config(METHOD)(SparseConfig)
        auto.register_quantizer(METHOD)(SparseQuantizer)


class _Watch(MetaPathFinder):
    """Lets the module be found as ever, then has it registered in, and goes."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002  of the protocol
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec and spec.loader:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module)
