"""Packaging: source archive, wheel built from it, and installed wheel."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import prunekit
from prunekit.cli.docs import pages
from tests.conftest import ROOT

EXTRAS = {"parquet", "demo", "hub", "harness", "lora", "bench", "dev"}
PAGES = (
    "report.html.j2", "sweep.html.j2", "macros.html.j2", "report.css", "model_card.md.j2",
)  # fmt: skip
DATA = {
    "prunekit/py.typed",
    "prunekit/cli/presets/starter.toml",
    *(f"prunekit/cli/presets/{name}.toml" for name in ("encoder", "heads", "quality", "serving")),
    "prunekit/cli/presets/apt.toml",
    "prunekit/cli/presets/sentinel.toml",
    *(f"prunekit/docs/{topic}.md" for topic in pages()),
    *(f"prunekit/reports/templates/{name}" for name in PAGES),
}
USE = """
import json, os, sys
installed, work, checkout = arguments
unwanted = {checkout, f"{checkout}/kernels"}
sys.path[:] = [installed, *(path for path in sys.path if path not in unwanted)]
os.chdir(work)
import prunekit, prunekit_kernels
from prunekit.cli.main import main
assert prunekit.__file__.startswith(installed), prunekit.__file__
assert prunekit_kernels.__file__.startswith(installed), prunekit_kernels.__file__
assert main(["--version"]) == 0 and main(["init"]) == 0 and main(["list"]) == 0
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
words = Tokenizer(models.WordLevel({f"word{i}": i for i in range(64)}, unk_token="word0"))
PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained("tiny")
sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1)
LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained("tiny")
sets = ['model.path="tiny"', 'prune.method="magnitude"', 'prune.pattern="2:4"', 'output.path="out"']
open("tiny.toml", "w").write("".join(f"{line}\\n" for line in sets))
assert main(["run", "tiny.toml", "--quiet"]) == 0
report = json.load(open("out/report.json"))
assert report["sparsity"]["achieved"] == 0.5
assert open("out/report.html").read().startswith("<!")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the source archive as for a package index."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("prunekit", "kernels", "tests", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), "."]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=source, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_wheel_holds_the_two_packages_whole_and_nothing_else(names):
    modules = {
        path.relative_to(folder).as_posix()
        for folder, package in ((ROOT, "prunekit"), (ROOT / "kernels", "prunekit_kernels"))
        for path in (folder / package).rglob("*.py")
    }
    assert {name for name in names if ".dist-info/" not in name} == modules | DATA


def test_every_file_beside_the_modules_is_packaged():
    kept = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "prunekit").rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert kept == DATA


def test_folder_kernels_is_no_package():
    # The import name ``kernels`` belongs to another distribution, which transformers imports.
    assert not (ROOT / "kernels/__init__.py").exists()


def test_metadata_says_what_the_package_says(metadata, wheel, names):
    assert metadata["Version"] == prunekit.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    with zipfile.ZipFile(wheel) as archive:
        (entries,) = (name for name in names if name.endswith("entry_points.txt"))
        assert b"prunekit = prunekit.__main__:main" in archive.read(entries)


def test_dev_brings_the_extras_that_tests_use_and_not_itself(metadata):
    own = [line for line in metadata.get_all("Requires-Dist") if line.startswith("prunekit")]
    assert own == ['prunekit[demo,lora,parquet]; extra == "dev"']


def test_wheel_works_where_there_is_no_checkout(wheel, tmp_path, stock_server):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    (tmp_path / "work").mkdir()
    places = tmp_path / "installed", tmp_path / "work", ROOT
    stock_server.start(tmp_path / "said", 1, USE, *places).succeed()
