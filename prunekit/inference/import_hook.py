"""Import hook that registers the quantizer in transformers.

``import prunekit`` installs it. It runs when transformers imports its quantizer registry, so that
``import prunekit`` itself imports neither torch nor transformers.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

QUANTIZER_REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Register the quantizer now, or as soon as transformers imports its registry."""
    if QUANTIZER_REGISTRY in sys.modules:
        _register(sys.modules[QUANTIZER_REGISTRY])
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def _register(auto: ModuleType) -> None:
    from prunekit.checkpoint.compressed import QUANT_METHOD

    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        from prunekit.inference.hf_quantizer import SparseConfig, SparseQuantizer

        auto.register_quantization_config(QUANT_METHOD)(SparseConfig)
        auto.register_quantizer(QUANT_METHOD)(SparseQuantizer)


class _RegistryFinder(MetaPathFinder):
    """One-time finder that wraps the loader of the registry module."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002  part of the protocol
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname != QUANTIZER_REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec and spec.loader:
            spec.loader = _RegistryLoader(spec.loader)
        return spec


class _RegistryLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module)
