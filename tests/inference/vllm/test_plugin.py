"""Entry point of the plug-in, and processes of vLLM that use it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import entry_points

import pytest

from prunekit.inference.vllm import register
from tests.inference.vllm.conftest import NEW, PROMPTS, tokens_of_transformers

LIGHT = """
import sys
import prunekit.inference.vllm
heavy = {"torch", "transformers", "vllm", "prunekit_kernels"} & {*sys.modules}
assert not heavy, heavy
"""
OPENED = """
import sys
from vllm.plugins import load_general_plugins
import vllm.plugins
load_general_plugins()
vllm.plugins.plugins_loaded = False
load_general_plugins()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
assert QUANTIZATION_METHODS.count("prunekit") == 1
assert get_quantization_config("prunekit").__name__ == "SparseConfig"
import transformers.quantizers.auto
ours = {name for name in sys.modules if name.startswith("prunekit")}
heavy = "prunekit_kernels", "prunekit.models", "prunekit.architectures"
heavy += "prunekit.checkpoint.reader", "prunekit.inference.serving"
heavy += ("prunekit.inference.vllm.layers",)
assert not ours & {*heavy}, ours
"""
GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, prompts, new, options = json.loads(sys.argv[1])
    model = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=64, **options)
    given = [{"prompt_token_ids": ids} for ids in prompts]
    wanted = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    found = [[*each.outputs[0].token_ids] for each in model.generate(given, wanted)]
    print("FOUND", json.dumps(found), flush=True)
"""
SERVER_SECONDS = 240


def python(code, *arguments, **variables):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, check=False, env=os.environ | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_entry_point_imports_nothing_heavy():
    python(LIGHT)


def test_the_entry_point_is_declared():
    (found,) = {
        entry.value for entry in entry_points(group="vllm.general_plugins", name="prunekit")
    }
    module, _, name = found.partition(":")
    assert (module, name) == (register.__module__, register.__name__)


@pytest.mark.serve
def test_vllm_registers_the_method_without_opening_prunekit():
    python(OPENED)


@pytest.mark.serve
def test_two_processes_share_a_model(folders, tmp_path):
    """Rows and columns are split; the tokens are those of one process."""
    folder = folders / "qwen2" / "2:4"
    script = tmp_path / "generate.py"
    script.write_text(GENERATE)
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    given = json.dumps([str(folder), PROMPTS, NEW, {"tensor_parallel_size": 2}])
    done = subprocess.run(
        [sys.executable, str(script), given],
        capture_output=True, text=True, check=False, env=os.environ | variables,
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if "FOUND" in line]
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(found[0].partition("FOUND")[2]) == tokens_of_transformers(folder)


@pytest.mark.serve
def test_the_command_serves_over_http(folders, tmp_path):
    """As an OpenAI client asks; the server is started by ``prunekit serve --run``."""
    folder, port = folders / "llama" / "2:4", _free_port()
    options = ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
    options += ["--enforce-eager", "--max-model-len", "64", "--served-model-name", "small"]
    command = [sys.executable, "-m", "prunekit", "serve", str(folder), "--run", *options]
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | variables) as server,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(f"{address}/health", server, tmp_path / "log")
            found = [_complete(address, prompt) for prompt in PROMPTS]
        finally:
            server.terminate()
    assert found == tokens_of_transformers(folder)
    said = (tmp_path / "log").read_text()
    assert said.count("prunekit: weights stay compressed in memory") == 1


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(address, server, log):
    deadline = time.monotonic() + SERVER_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(log.read_text()[-3000:])


def _complete(address, prompt):
    wanted = {"model": "small", "prompt": prompt, "max_tokens": NEW, "temperature": 0}
    wanted |= {"ignore_eos": True, "return_token_ids": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(wanted).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["token_ids"]
