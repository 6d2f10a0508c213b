"""Registration of the quantizer in transformers, for any import order."""

import importlib
import sys

import pytest

from prunekit.inference import import_hook
from prunekit.inference.hf_quantizer import SparseConfig, SparseQuantizer
from tests.support.fresh_process import run_script


def test_the_quantizer_is_registered_once_transformers_is_imported():
    auto = importlib.import_module(import_hook.QUANTIZER_REGISTRY)
    assert auto.AUTO_QUANTIZER_MAPPING["prunekit"] is SparseQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["prunekit"] is SparseConfig


def test_the_finder_is_installed_once_and_ignores_other_modules(monkeypatch):
    monkeypatch.delitem(sys.modules, import_hook.QUANTIZER_REGISTRY)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    before = len(sys.meta_path)
    import_hook.install()
    import_hook.install()
    assert len(sys.meta_path) == before + 1
    finder = sys.meta_path[0]
    assert finder.find_spec("json", None) is None
    assert sys.meta_path[0] is finder


ORDERS = {
    "prunekit first": "import prunekit; assert 'torch' not in sys.modules; import transformers",
    "transformers first": "import transformers; import prunekit",
    "transformers in use": "from transformers import LlamaModel; import prunekit",
}


@pytest.mark.slow
@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
def test_loads_in_a_new_process_whatever_is_imported_first(sparse_folders, imports):
    script = f"""
import sys
{imports}
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(sparse_folders / "2:4")!r})
print(sum(type(module).__name__ == "SparseLinear" for module in model.modules()))
"""
    done = run_script(script, with_prunekit=True)
    assert done.stdout.split() == ["14"], done.stderr
