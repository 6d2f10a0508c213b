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


ORDERS = [
    pytest.param(
        "import prunekit; assert 'torch' not in sys.modules; import transformers",
        id="prunekit first",
    ),
    # Until it is used, transformers imports nothing: the hook is the same.
    pytest.param(
        "import transformers; import prunekit", id="transformers first", marks=pytest.mark.soak
    ),
]
OPEN = """
model = transformers.AutoModelForCausalLM.from_pretrained(*arguments)
print(sum(type(module).__name__ == "SparseLinear" for module in model.modules()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("imports", ORDERS)
def test_loads_in_a_new_process_whatever_is_imported_first(sparse_folders, imports):
    arguments = [str(sparse_folders / "2:4")]
    done = run_script(f"import sys\n{imports}\n{arguments = }{OPEN}")
    assert done.stdout.split() == ["14"], done.stderr


def test_loads_where_transformers_is_in_use(sparse_folders, stock_server, tmp_path):
    script = f"""
import sys, transformers
assert "{import_hook.QUANTIZER_REGISTRY}" in sys.modules and "prunekit" not in sys.modules
import prunekit
{OPEN}"""
    world = stock_server.start(tmp_path, 1, script, sparse_folders / "2:4")
    world.succeed()
    assert world.stdout(0).split() == ["14"]
