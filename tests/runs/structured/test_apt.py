"""``[apt]``: a run that trains adapters which prune and grow, and writes the smaller model."""

import json

import pytest

import prunekit
from prunekit.config.load import load_config
from prunekit.evaluation.verify import verify
from prunekit.runs.structured.planner import plan
from prunekit.structured.parameter_budget import counted_parameters
from tests.support import checkpoints
from tests.support.adapters import PEFT_WARNS
from tests.support.labelled import words

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("proof_in_process"),
    pytest.mark.filterwarnings(*PEFT_WARNS),
]

CONFIG = """\
[model]
path = "{model}"
device = "cpu"
[calibration]
data = "{model}/text.txt"
samples = 12
length = 12
[apt]
parameters = 0.6
rank = 2
warmup = 2
window = 2
windows = 2
decay = 0.5
steps = 8
rate = 1e-2
batch = 4
held_out = 4
every = 4
{keys}
[output]
path = "{output}"
"""


def planned(folder, output, keys=""):
    path = output.with_suffix(".toml")
    path.write_text(CONFIG.format(model=folder, output=output, keys=keys))
    return plan(load_config(path))


@pytest.mark.parametrize("keys", ["", "[distill]"])
def test_a_run_trains_prunes_merges_writes_and_proves(llama, tmp_path, keys):
    made = planned(llama, tmp_path / "out", keys)
    [*prunekit.run(made)]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert all(check.passed for check in verify(tmp_path / "out"))
    smaller = prunekit.load(tmp_path / "out")
    left = sum(each.numel() for each in counted_parameters(smaller, "blocks"))
    assert left <= 0.6 * made.counted_parameters
    assert not any("lora" in name for name in smaller.state_dict())
    history = report["training"]["history"]
    assert history[0]["achieved"] == 0
    assert history[-1]["achieved"] == pytest.approx(1 - left / made.counted_parameters)
    assert history[-1]["parameters"] == left
    kept = dict.fromkeys(("heads", "neurons"), 0)
    for layer in report["layers"]:
        kept[layer["kind"]] += len(layer["kept"])
        assert len(layer["scores"]) == layer["units"]
        assert layer["sparsity"] == pytest.approx(1 - len(layer["kept"]) / layer["units"])
    assert history[-1]["units"] == kept
    ranks = history[-1]["ranks"]
    assert ranks["smallest"] == 2 < ranks["mean"] < ranks["largest"] <= 64
    assert report["config"]["apt"]["parameters"] == 0.6
    assert "prune" not in report["config"]
    page = (tmp_path / "out/report.html").read_text()
    assert "Ranks of the adapters" in page
    assert "largest rank" in (tmp_path / "out/training.csv").read_text()
    assert "60 % of the parameters" in page or "60.0 % of the parameters" in page


WORDS = """\
[model]
path = "{model}"
device = "cpu"
[calibration]
task = "seq2seq"
data = "{data}"
samples = 5
[apt]
parameters = 0.5
kinds = {kinds}
rank = 2
most_rank = 6
warmup = 2
window = 2
windows = 2
decay = 0.5
steps = 8
rate = 1e-2
batch = 2
held_out = 1
every = 4
{keys}
[evaluate]
task = "seq2seq"
data = "{data}"
[output]
path = "{output}"
"""


@pytest.mark.parametrize(
    ("kinds", "keys"),
    [
        ('["heads", "neurons"]', "uniform = true"),
        ('["hidden", "heads", "neurons"]', "least = 0\n[distill]"),
    ],
)
def test_t5_learns_to_sort_while_it_is_pruned(tmp_path, monkeypatch, kinds, keys):
    """Encoder, decoder and cross-attention; one position bias for the blocks of a stack."""
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")
    model = checkpoints.write(tmp_path / "t5", "t5", num_decoder_layers=2)
    file = tmp_path / "t5.toml"
    paths = {"model": model, "data": words(tmp_path), "output": tmp_path / "out"}
    file.write_text(WORDS.format(**paths, kinds=kinds, keys=keys))
    made = plan(load_config(file))
    [*prunekit.run(made)]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert all(check.passed for check in verify(tmp_path / "out"))
    smaller = prunekit.load(tmp_path / "out")
    left = sum(each.numel() for each in counted_parameters(smaller, "blocks"))
    assert left <= 0.5 * made.counted_parameters
    assert {row["metric"] for row in report["evaluation"]} >= {"exact match", "loss"}
    assert report["stock"] == ("uniform" in keys)
    places = {layer["name"].rpartition(".")[2] for layer in report["layers"]}
    assert {"SelfAttention", "EncDecAttention", "wo"} <= places
