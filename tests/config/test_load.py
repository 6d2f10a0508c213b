"""All errors at once with their places; defaults are filled in."""

import os
import subprocess
import sys
from pathlib import Path

import prunekit
from prunekit.allocations import allocations
from prunekit.config.load import TABLES
from prunekit.methods import methods
from prunekit.methods.sparsegpt import SparseGPT
from tests.support.configs import GOOD


def test_says_all_mistakes_at_once_in_the_order_of_the_file(mistakes):
    text = """\
[model]
path = "./nowhere"
dtyp = "auto"
dtype = "flot32"
device = "gpu"
[calibration]
data = [
  "train.txt",  # [prune]
  "pydoc:trai",
]
samples = "many"
length = 0
seed = true
[prune]
method = "sparse-gpt"
damping = 0.1
patern = "2:4"
sparsity = 2
skip = "lm_head"
[prune.allocation]
name = "owl"
spred = 3
spread = 0.9
[evalute]
x = 1
[output]
format = "sparse"
"""
    assert mistakes(text, "foo", "prune.steps=0", "model.path.x=1", "prun.y=1") == [
        "--set foo: write KEY=VALUE, e.g. prune.sparsity=0.6.",
        "--set model.path.x=1: model.path is not a table.",
        "config.toml:2: model.path: FOLDER/nowhere: no such folder, and not a hub id such as "
        "Qwen/Qwen3-0.6B.",
        'config.toml:3: model.dtyp: no such key. Did you mean "dtype"?',
        'config.toml:4: model.dtype: "flot32" is not possible. Did you mean "float32"? '
        "Choose: auto, float32, float16, bfloat16.",
        'config.toml:5: model.device: "gpu" is not a device. Choose: auto, cpu, cuda, cuda:0.',
        "config.toml:7: calibration.data: FOLDER/train.txt: no such file.",
        "config.toml:7: calibration.data: pydoc:trai: choose pydoc:train or pydoc:test.",
        'config.toml:11: calibration.samples: "many" is not a whole number.',
        "config.toml:12: calibration.length: 0 is not possible: at least 1.",
        "config.toml:13: calibration.seed: true is not a whole number.",
        'config.toml:15: prune.method: "sparse-gpt" is not a method. Did you mean "sparsegpt"? '
        f"Choose: {', '.join(methods())}.",
        'config.toml:17: prune.patern: no such key. Did you mean "pattern"?',
        "config.toml:18: prune.sparsity: 2 is not possible: at most 1.",
        'config.toml:19: prune.skip: "lm_head" is not a list.',
        'config.toml:22: prune.allocation.spred: no such key. Did you mean "spread"?',
        "config.toml:23: prune.allocation.spread: 0.9 is not possible: less than 0.5.",
        'config.toml:24: evalute: no such key. Did you mean "evaluate"?',
        "config.toml:26: output.path: missing. Folder for the checkpoint, its report and its "
        "journal.",
        'config.toml:27: output.format: "sparse" is not possible. Choose: dense, 2:4, bitmask.',
        "--set prune.steps=0: 0 is not possible: at least 1.",
        '--set prun.y=1: prun: no such key. Did you mean "prune"?',
    ]


def test_missing_sections_are_said_without_a_line(mistakes):
    assert [line.partition(": ")[2].partition(".")[0] for line in mistakes("")] == [
        "model: missing",
        "prune: missing",
        "output: missing",
    ]


def test_thousands_of_mistakes_are_said_in_part(mistakes):
    lines = mistakes(GOOD + "".join(f"k{number} = 1\n" for number in range(3000)))
    assert len(lines) == 101
    assert lines[0] == (
        "config.toml:11: output.k0: no such key. Choose: path, format, quantize, push, "
        "max_shard_size."
    )
    assert lines[100] == "These are the first 100 mistakes of more."


def test_fills_in_what_was_not_written(load):
    config = load(GOOD)
    assert config.calibration is not None
    assert config.calibration.data == ["pydoc:train"]
    assert config.calibration.samples == 128
    assert config.evaluate is None
    assert config.prune.method == SparseGPT(damping=0.01)
    assert config.prune.allocation == allocations()["uniform"]()
    assert config.text == GOOD


def test_every_key_and_setting_is_explained():
    kinds = [*TABLES.values(), *methods().values(), *allocations().values()]
    for kind in kinds:
        for key, field in kind.model_fields.items():
            assert field.description, f"{kind.__name__}.{key}"


def test_torch_is_not_imported_for_a_config():
    code = "import sys, prunekit; prunekit.load_config; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(prunekit.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 0
